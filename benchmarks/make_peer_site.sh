#!/usr/bin/env bash
# Pack the Python packages that the peers need into one archive, for a GPU machine without network.
#
#   bash benchmarks/make_peer_site.sh OUT.tgz
#   # on the GPU machine: mkdir site && tar xzf OUT.tgz -C site && export PYTHONPATH=$PWD/site
#
# The machine brings torch, triton, transformers and peft itself; PYTHON_VERSION and CUDA_VERSION name what it runs.
set -euo pipefail

if [[ $# -ne 1 ]]; then
  echo "usage: make_peer_site.sh OUT.tgz" >&2
  exit 2
fi

python_version=${PYTHON_VERSION:-3.12}
cuda_version=${CUDA_VERSION:-130}
archive=$(realpath -m "$1")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Exact versions: a benchmark row is worth nothing if its peer drifts.
packages=(
  bitsandbytes==0.50.2
  liger-kernel==0.8.5
  unsloth==2026.10.9
  unsloth_zoo==2026.10.9
  trl==1.15.0
  datasets==4.8.5
  dill==0.4.0
  multiprocess==0.70.16
  torchao==0.17.0
  xformers==0.0.35
  cut-cross-entropy hf_transfer tyro docstring-parser typeguard shtab json5 msgspec nest-asyncio structlog
)

# pip matches a platform tag exactly, so every glibc that such a machine surely has is listed.
platforms=()
for glibc in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${glibc}_x86_64")
done

for package in "${packages[@]}"; do
  python3 -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$python_version" \
    "${platforms[@]}" --dest "$scratch/wheels" "$package"
done

mkdir "$scratch/site"
for wheel in "$scratch"/wheels/*.whl; do
  python3 -m zipfile -e "$wheel" "$scratch/site"
done

# bitsandbytes ships a library for every backend; one is enough. Unsloth's web studio plays no part in a step.
find "$scratch/site/bitsandbytes" -name 'libbitsandbytes_*.so' ! -name "libbitsandbytes_cuda${cuda_version}.so" \
  ! -name 'libbitsandbytes_cpu.so' -delete
rm -rf "$scratch/site/studio"

mkdir -p "$(dirname "$archive")"
tar czf "$archive" -C "$scratch/site" .
du -h "$archive"
