#!/bin/sh
# Build an FFCV wheel into DEST with PYTHON:  build_ffcv.sh PYTHON VERSION DEST
#
# FFCV has no wheels. Its own build includes and links every OpenCV module; it uses core and imgproc. So it is shown
# an opencv4.pc and an opencv2/opencv.hpp of ours that name those two, and needs only their headers, TurboJPEG's,
# pkg-config and a C++ compiler.
set -eu
python=$1 version=$2
mkdir -p "$3"
dest=$(cd "$3" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

includes=$(pkg-config --cflags opencv4 2>/dev/null || echo "-I/usr/include/opencv4")
libraries=$(pkg-config --libs-only-L opencv4 2>/dev/null || true)

mkdir -p "$work/include/opencv2" "$work/pkgconfig"
cat >"$work/include/opencv2/opencv.hpp" <<'HPP'
#pragma once
#include <opencv2/core.hpp>
#include <opencv2/imgproc.hpp>
HPP
cat >"$work/pkgconfig/opencv4.pc" <<PC
Name: opencv4
Description: OpenCV core and imgproc
Version: 4
Cflags: -I$work/include $includes
Libs: $libraries -lopencv_imgproc -lopencv_core
PC

PKG_CONFIG_PATH=$work/pkgconfig${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH} \
  "$python" -m pip wheel -q --no-deps --no-cache-dir -w "$dest" "ffcv==$version"
