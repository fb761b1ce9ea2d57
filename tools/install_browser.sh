#!/bin/sh
# Install Chromium, in which tests open pages, where apt is there (as root or through sudo). Elsewhere those are skipped.
set -eu
for name in chromium google-chrome; do
  if command -v "$name" >/dev/null 2>&1; then exit 0; fi
done
sudo=
if [ "$(id -u)" -ne 0 ]; then sudo=$(command -v sudo || true); fi
if command -v apt-get >/dev/null 2>&1 && { [ "$(id -u)" -eq 0 ] || [ -n "$sudo" ]; }; then
  echo "fastar: installing chromium"
  apt="$sudo env DEBIAN_FRONTEND=noninteractive apt-get"
  if { $apt update -qq && $apt install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 </dev/null; then exit 0; fi
fi
echo "fastar: no chromium: the tests that open pages in a browser are skipped" >&2
