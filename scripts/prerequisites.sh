#!/bin/sh
# What a fresh Debian lacks for a Python extension, and for the emulator where it is named as well: installed where we
# may, named in one sentence where we may not. Usage: prerequisites.sh PYTHON [qemu-system-x86_64]
set -eu
python=$1
emulator=${2:-}
missing=""
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
"$python" -c 'import os, sysconfig; assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))' \
    2>/dev/null || missing="$missing python3-dev"
command -v g++ >/dev/null || missing="$missing g++"
lean=""
if [ -n "$emulator" ] && ! command -v "$emulator" >/dev/null; then
    missing="$missing qemu-system-x86"
    lean=--no-install-recommends # what it recommends are screens and sound
fi
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing$missing" >&2
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $lean $missing >/dev/null
else
    echo "fourfold needs$missing: run 'sudo apt-get install $lean$missing' and try again" >&2
    exit 2
fi
