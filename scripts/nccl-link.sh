#!/usr/bin/env bash
# Makes a link `libnccl.so` to the NCCL of PyPI (nvidia-nccl-cu12, nvidia-nccl-cu13; PyTorch for CUDA brings one), which is
# named `libnccl.so.2` only, and prints the line that lets programs find it.
#
# usage: eval "$(bash scripts/nccl-link.sh)"           the NCCL of `python3`
#        eval "$(bash scripts/nccl-link.sh PYTHON)"    that of another Python, such as .venv/bin/python
set -euo pipefail

python=${1:-python3}
library=$("$python" - <<'PY'
import glob, importlib.util, os, sys
spec = importlib.util.find_spec("nvidia")
folders = spec.submodule_search_locations if spec else []
found = [f for folder in folders for f in glob.glob(os.path.join(folder, "nccl", "lib", "libnccl.so.*"))]
print(sorted(found)[-1] if found else "")
PY
)
if [ -z "$library" ]; then
  echo "$python has no NCCL: pip install nvidia-nccl-cu13" >&2
  exit 1
fi
folder=${XDG_CACHE_HOME:-$HOME/.cache}/burn-nf4/nccl
mkdir -p "$folder"
ln -sfn "$library" "$folder/libnccl.so"
printf 'export LD_LIBRARY_PATH=%q${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}\n' "$folder"
