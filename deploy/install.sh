#!/bin/sh
# How the container image gets tokenbus: install.sh PREFIX DEVICE, beside the sources. PREFIX becomes a virtual environment with
# exactly the versions of constraints.txt. DEVICE is cpu or cuda: PyPI's torch brings CUDA, PyTorch's own index has one
# without it, a tenth of the size.
set -eu
prefix=$1
device=$2
case $device in
    cpu | cuda) ;;
    *)
        echo "install.sh: DEVICE must be cpu or cuda, not '$device'" >&2
        exit 2
        ;;
esac
cd "$(dirname "$0")/.."

python3 -m venv "$prefix"
pip() { "$prefix/bin/python" -m pip --no-cache-dir --disable-pip-version-check "$@"; }

if [ "$device" = cpu ]; then
    pip install --constraint constraints.txt --index-url https://download.pytorch.org/whl/cpu --no-deps torch
fi
pip install --constraint constraints.txt '.[tracing]'
