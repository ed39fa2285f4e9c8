#!/bin/sh
# What a fresh Debian lacks for a Python extension, and for the programs that are named as well: the emulator, the browser
# (with its driver, and letters for Chinese). Installed where we may, named in one sentence where we may not.
# Usage: prerequisites.sh PYTHON [qemu-system-x86_64] [chromium]
set -eu
python=$1
shift
missing=""
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
"$python" -c 'import os, sysconfig; assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))' \
    2>/dev/null || missing="$missing python3-dev"
command -v g++ >/dev/null || missing="$missing g++"
lean=""
for program; do
    lean=--no-install-recommends # what these recommend are screens and sound
    case $program in
    qemu-system-x86_64) command -v "$program" >/dev/null || missing="$missing qemu-system-x86" ;;
    chromium) { command -v chromium && command -v chromedriver; } >/dev/null ||
        missing="$missing chromium chromium-driver fonts-wqy-microhei" ;;
    *) echo "prerequisites.sh knows no program $program" >&2 && exit 2 ;;
    esac
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing$missing" >&2
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $lean $missing >/dev/null
else
    echo "fourfold needs$missing: run 'sudo apt-get install $lean$missing' and try again" >&2
    exit 2
fi
