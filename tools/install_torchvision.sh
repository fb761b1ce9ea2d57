#!/bin/sh
# Install torchvision, whose networks are test cases, beside the torch that is there:  install_torchvision.sh VENV
#
# A CPU build of torch takes a CPU build of torchvision: beside another one `import torchvision` fails. Where pip finds
# none, its Python files alone go to VENV/share/torchvision, where the tests (tools/symmetry_table.py) and nobody else
# look. Settings: TORCH_INDEX (an index that carries CPU builds).
set -eu
venv=$1
python=$venv/bin/python

# 0.28.1 goes with torch 2.13.1, and so on.
TORCHVISION=$("$python" -c 'from importlib.metadata import version as v; _, minor, patch = v("torch").partition("+")[0].split("."); print(f"0.{int(minor) + 15}.{patch}")')

pip() { "$python" -m pip --disable-pip-version-check "$@"; }
works() { "$python" -c 'import sys, torchvision; sys.exit(torchvision.__version__.partition("+")[0] != sys.argv[1])' "$TORCHVISION" >/dev/null 2>&1; }

works && exit 0
build=$("$python" -c 'import torch; print(torch.version.cuda or "cpu")')
if [ "$build" = cpu ]; then
  pip install -q ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "torchvision==$TORCHVISION+cpu" >/dev/null 2>&1 || true
fi
works || pip install -q "torchvision==$TORCHVISION"
works && exit 0
pip uninstall -q -y torchvision
pip install -q --no-deps --upgrade --target "$venv/share/torchvision" "torchvision==$TORCHVISION"
echo "fastar: no build of torchvision for this torch where pip looks (TORCH_INDEX=URL names an index): it is there for the tests alone" >&2
