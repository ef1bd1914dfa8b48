#!/usr/bin/env bash
# Install LLVM for the features `cuda` and `cpu` from PyPI.
#
# CubeCL links LLVM through the crate `tracel-llvm-bundler`, whose build script downloads a bundle
# from GitHub. Where GitHub cannot be reached, this script puts the same major version of LLVM, as
# the PyPI packages mlc-llvm-static carry it, into the folder where that build script looks, and
# marks it as installed. Where GitHub can be reached the script is not needed.
#
# The feature `rocm` is not served: it also needs LLD, which these packages do not have.
#
# usage: scripts/install-llvm.sh          Linux on x86_64 or aarch64, python3 with pip, about 1 GB
#                                         of free disk (400 MB stay)
set -euo pipefail

say() { printf 'install-llvm: %s\n' "$*"; }
die() { printf 'install-llvm: error: %s\n' "$*" >&2; exit 1; }

lock="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/Cargo.lock"
[ -f "$lock" ] || die "no Cargo.lock beside the scripts folder"

# The bundler's release names the folder.
release=$(awk '$0 == "name = \"tracel-llvm-bundler\"" { found = 1; next }
               found && $1 == "version" { gsub(/"/, "", $3); print $3; exit }' "$lock")
[ -n "$release" ] || die "Cargo.lock has no tracel-llvm-bundler"

# bundler release -> PyPI version, with the SHA-256 of its x86_64 and aarch64 wheels
case "$release" in
  23.1.*)
    pypi=23.1.1.post0
    requirements="\
mlc-llvm-static==$pypi \
--hash=sha256:dcfec888abfaa418be77d41af585805f31463584cf9c90582992c00f392c1ac5 \
--hash=sha256:3d4b1b30cea531ffa5956fa14ff4ffb0b1ed61284bf31eac3ebb752fb308b71d
mlc-llvm-static-extra-targets==$pypi \
--hash=sha256:c36e834d9a4e9cf9759f27fece65711ece7a2fc2b5a96dbb15d66f5e9e787929 \
--hash=sha256:b1ddc694cf75bb1502b64c1898b15915362450453b637534886519e20e3d5522"
    ;;
  *) die "no PyPI build is known for tracel-llvm-bundler $release: add it to this script" ;;
esac

# The folder, as the bundler computes it on Linux (dirs::data_local_dir): a relative XDG_DATA_HOME
# is ignored, an empty HOME is looked up.
[ "$(uname -s)" = Linux ] || die "only Linux is supported, this is $(uname -s)"
home=${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}
case "${XDG_DATA_HOME:-}" in
  /*) data=$XDG_DATA_HOME ;;
  *) data=$home/.local/share ;;
esac
target=$data/tracel/tracel-llvm-$release
sentinel=.tracel-llvm-installed

if [ -e "$target/$sentinel" ]; then
  say "already installed: $target"
  exit 0
fi

arch=$(uname -m)
case "$arch" in
  x86_64 | aarch64) ;;
  *) die "no PyPI build of LLVM for $arch" ;;
esac
python3 -m pip --version >/dev/null 2>&1 || die "python3 with pip is needed (Debian: python3-pip)"

# Work beside the target, so that the last step is a rename and a broken download leaves nothing.
mkdir -p "$data/tracel"
work=$(mktemp -d "$data/tracel/.install-llvm.XXXXXX")
trap 'rm -rf "$work"' EXIT

say "downloading mlc-llvm-static $pypi for $arch from PyPI (about 90 MB)"
printf '%s\n' "$requirements" >"$work/requirements.txt"
# The wheels are py3-none: the interpreter's own version and platform tags need not match.
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --implementation py --abi none --python-version 3.12 --platform "manylinux_2_28_$arch" \
  --require-hashes --requirement "$work/requirements.txt" --dest "$work/wheels"

for wheel in "$work"/wheels/*.whl; do
  say "unpacking $(basename "$wheel")"
  python3 -m zipfile -e "$wheel" "$work/unpacked"
  rm "$wheel"
done

static=$work/unpacked/mlc_llvm_static/static
chmod +x "$static"/bin/*
version=$("$static/bin/llvm-config" --link-static --version)
"$static/bin/llvm-config" --link-static --libs >/dev/null
: >"$static/$sentinel"

if [ -e "$target" ]; then
  say "replacing an unfinished installation"
  rm -rf "$target"
fi
mv "$static" "$target"
say "LLVM $version installed in $target"
