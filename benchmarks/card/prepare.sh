#!/bin/bash
# Makes .gpu/ (at most 40 MiB) in the checkout's root: all that a bare machine with a card, CUDA 13, Python 3.12 and no network lacks.
# Needs PyPI; run it in the checkout's root:
#   bash benchmarks/card/prepare.sh
# and there, in the root of a copy of the checkout with .gpu/ in it:  bash .gpu/on_card.sh
set -eu
FROM=$(cd "$(dirname "$0")" && pwd)
KEEP=${KEEP:-${TMPDIR:-/tmp}/moss-jt-card-wheels}   # downloads, kept between runs
PYTHON=${PYTHON:-python3}
LIMIT_MIB=${LIMIT_MIB:-40}
WHEELS="cupy_cuda13x-13.6.0 fastrlock-0.8.4 numpy-1.26.4 astunparse-1.6.3 six-1.17.0 prompt_toolkit-3.0.53 wcwidth-0.9.4
nvidia_ml_py-13.615.71 jittor-1.3.11.0"
[ -f pyproject.toml ] && [ -d moss_jt ] || { echo "run this in the root of the moss-jt checkout"; exit 1; }
mkdir -p "$KEEP" .gpu
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

platforms=()
for platform in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux_2_12 manylinux2010 manylinux_2_5 manylinux1; do
    platforms+=(--platform "${platform}_x86_64")
done
wheel_of() { find "$KEEP" -name "$1-*.whl" | head -1; }
get() {  # get NAME-VERSION: its wheel, or one made of its sources: Jittor is published as these only, plain Python and C++
    local name=${1%-*} version=${1##*-}
    [ -n "$(wheel_of "$1")" ] && return
    $PYTHON -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
        -d "$KEEP" "$name==$version" 2> "$site/pip.log" && return
    $PYTHON -m pip wheel -q --no-deps -w "$KEEP" "$name==$version" 2>> "$site/pip.log" || { cat "$site/pip.log"; exit 1; }
}
mkdir "$site/packages"
for wheel in $WHEELS; do
    get "$wheel"
    (cd "$site/packages" && $PYTHON -m zipfile -e "$(wheel_of "$wheel")" .)
done
cd "$site/packages"
# CuPy imports this one only where it is there (cupy/cuda/__init__.py), and it is large; tests are not needed there either.
rm -rf cupy/cuda/thrust.*.so numpy/*/tests numpy/tests numpy/f2py jittor/test numpy/core/lib numpy/random/lib
mkdir moss_jt-0.1.0.dist-info  # moss_jt.commands.cli asks for its version
printf 'Metadata-Version: 2.1\nName: moss-jt\nVersion: 0.1.0\n' > moss_jt-0.1.0.dist-info/METADATA
cd "$OLDPWD"
tar -C "$site/packages" -c . | xz -6 -T2 > .gpu/site.tar.xz
cp "$FROM/on_card.sh" .gpu/
ls -l .gpu
mib=$(($(du -sb .gpu | cut -f1) >> 20))
echo "$mib MiB of $LIMIT_MIB"
[ "$mib" -lt "$LIMIT_MIB" ] || { echo "too much"; exit 1; }
