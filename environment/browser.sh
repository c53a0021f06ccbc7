#!/bin/sh
# Sees to a Chromium for the tests of the page: the one that is here, or Debian's, installed by apt-get.
set -u
for name in "${CHROMIUM:-}" chromium chromium-browser google-chrome google-chrome-stable; do
    if [ -n "$name" ] && path=$(command -v "$name"); then
        echo "the tests of the page use $path"
        exit 0
    fi
done
if ! command -v apt-get >/dev/null; then
    echo "no Chromium here, and no apt-get to install it: install one and put it on PATH, or name it with CHROMIUM=/path/to/chromium" >&2
    exit 1
fi
if [ "$(id -u)" = 0 ]; then
    as_root=
elif sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    echo "no Chromium here: run this as root or with sudo: apt-get update && apt-get install chromium" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
$as_root apt-get update -q && $as_root apt-get install -q -y --no-install-recommends chromium
