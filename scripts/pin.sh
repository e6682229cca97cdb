#!/usr/bin/env bash
# Writes constraints.txt anew: the newest versions of everything but torch, which stays where it is pinned. Run it with the
# oldest supported Python, then `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
grep '^torch==' constraints.txt > "$folder/torch.txt"
"${PYTHON:-python3}" -m venv "$folder/venv"
PIP_CONSTRAINT="$folder/torch.txt" "$folder/venv/bin/pip" install --quiet -e '.[all,dev]'
{
  sed -n '/^#/p' constraints.txt
  "$folder/venv/bin/pip" freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+cpu$//'
} > "$folder/constraints.txt"
mv "$folder/constraints.txt" constraints.txt
