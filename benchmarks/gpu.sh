#!/usr/bin/env bash
# Measurements on one NVIDIA GPU, for whoever has one. Nothing here needs a network.
#
#   benchmarks/gpu.sh                     engine, training and tests: 8 minutes at most
#   benchmarks/gpu.sh cifar MINUTES       CIFAR100-LT at 200 epochs, as many trainings as fit
#   benchmarks/gpu.sh --smoke             both on the CPU with tiny networks; times mean nothing
#
# Results are gpu.json and cifar.zip in the folder --out DIR, by default $OUT or build/gpu. Each is
# written after every measurement or training, so that a kill keeps what is there. Other options
# are those of gpu.py and gpu_cifar.py. PYTHON is the interpreter, by default python3.
# benchmarks/README.md says what is needed and what comes back.
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$here/../src:$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
out=${OUT:-build/gpu}

case ${1:-} in
cifar)
    minutes=${2:?usage: gpu.sh cifar MINUTES [options]}
    exec "$python" "$here/gpu_cifar.py" --out "$out" --minutes "$minutes" "${@:3}"
    ;;
--smoke)
    "$python" "$here/gpu.py" --out "$out" "$@"
    exec "$python" "$here/gpu_cifar.py" --out "$out" "$@"
    ;;
*)
    exec "$python" "$here/gpu.py" --out "$out" "$@"
    ;;
esac
