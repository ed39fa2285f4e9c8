#!/bin/sh
# What a fresh Debian lacks for a Python extension: installed where we may, named in one sentence where we may not.
set -eu
python=$1
missing=""
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
"$python" -c 'import os, sysconfig; assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))' \
    2>/dev/null || missing="$missing python3-dev"
command -v g++ >/dev/null || missing="$missing g++"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing$missing" >&2
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing >/dev/null
else
    echo "fourfold needs$missing: run 'sudo apt-get install$missing' and try again" >&2
    exit 2
fi
