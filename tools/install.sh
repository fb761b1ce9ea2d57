#!/bin/sh
# Install fastar into a virtual environment:  install.sh VENV      (called by `make install`)
#
# System packages come from apt where it is there (as root or through sudo); elsewhere one line says what is missing.
# Settings: PYTHON (default python3), TORCH (a version of torch, default the pinned one), TORCH_INDEX (an index that
# carries CPU builds of torch).
set -eu
venv=$1
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)

TORCH=${TORCH:-2.13.0} TRITON=3.8.0 FFCV=1.0.2

fail() { echo "fastar: $*" >&2; exit 2; }

command -v "$python" >/dev/null 2>&1 || fail "$python not found: install Python 3.10 or newer, or set PYTHON="
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$("$python" --version 2>&1) is too old: fastar needs Python 3.10 or newer; set PYTHON= to one"

# What the build needs, as pairs of a test and the Debian package that passes it.
has_header() { echo "#include <$1>" | c++ -E -x c++ -I/usr/include/opencv4 $(pkg-config --cflags opencv4 2>/dev/null || true) - >/dev/null 2>&1; }
# Debian's package for this interpreter: python3-dev for /usr/bin/python3, python3.12-dev for another 3.12.
debian_python() {
  case $(command -v "$python") in
    /usr/bin/python3) echo "python3-$1" ;;
    *) "$python" -c 'import sys; print("python%d.%d-%s" % (*sys.version_info[:2], sys.argv[1]))' "$1" ;;
  esac
}
missing=
command -v c++ >/dev/null 2>&1 || missing="$missing g++"
command -v pkg-config >/dev/null 2>&1 || missing="$missing pkg-config"
has_header opencv2/core.hpp || missing="$missing libopencv-core-dev"
has_header opencv2/imgproc.hpp || missing="$missing libopencv-imgproc-dev"
pkg-config --exists libturbojpeg 2>/dev/null || missing="$missing libturbojpeg0-dev"
"$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || missing="$missing $(debian_python venv)"
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
  missing="$missing $(debian_python dev)"

if [ -n "$missing" ]; then
  sudo=
  if [ "$(id -u)" -ne 0 ]; then sudo=$(command -v sudo || true); fi
  if ! command -v apt-get >/dev/null 2>&1 || { [ "$(id -u)" -ne 0 ] && [ -z "$sudo" ]; }; then
    fail "missing:$missing (Debian's names); without apt and root: conda install -c conda-forge cxx-compiler pkg-config opencv libjpeg-turbo, then make again"
  fi
  echo "fastar: installing$missing"
  log=$(mktemp)
  apt="$sudo env DEBIAN_FRONTEND=noninteractive apt-get"
  { $apt update -qq && $apt install -y -qq --no-install-recommends $missing; } >"$log" 2>&1 </dev/null || {
    tail -n 5 "$log" >&2
    fail "apt could not install:$missing (log: $log)"
  }
  rm -f "$log"
fi

echo "fastar: making $venv"
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# torch first, since it decides which triton fits. A CUDA build where there is an NVIDIA driver, else a CPU build.
if nvidia-smi >/dev/null 2>&1; then
  pip install -q "torch==$TORCH"
else
  pip install -q ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "torch==$TORCH+cpu" 2>/dev/null || {
    echo "fastar: no CPU build of torch for this Python where pip looks: installing the default (TORCH_INDEX=URL names an index)" >&2
    pip install -q "torch==$TORCH"
  }
fi
"$venv/bin/python" -c 'import triton' 2>/dev/null || pip install -q "triton==$TRITON" ||
  echo "fastar: no triton for this machine: the plain-torch kernels will be used" >&2
pip install -q -r "$root/requirements.txt" "torch==$TORCH" # that what asks for torch takes no other
# As setup.py: the last version with wheels, which are for Python 3.10 and 3.11; for later ones it is built.
LAPJV=$("$venv/bin/python" -c 'import sys; print("1.3.27" if sys.version_info < (3, 12) else "1.3.29")')
pip install -q "lapjv==$LAPJV" || echo "fastar: lapjv could not be installed: SciPy's solver will be used" >&2

if ! "$venv/bin/python" -c 'import importlib.metadata as m, sys; sys.exit(m.version("ffcv") != sys.argv[1])' "$FFCV" 2>/dev/null; then
  echo "fastar: building FFCV $FFCV"
  sh "$root/tools/build_ffcv.sh" "$venv/bin/python" "$FFCV" "$venv/wheels"
  pip install -q --no-deps "$venv/wheels/ffcv-$FFCV"*.whl
fi
# FFCV asks for opencv-python, which needs a display's libraries; requirements.txt has the headless build instead.
pip install -q --no-deps --no-build-isolation -e "$root"
