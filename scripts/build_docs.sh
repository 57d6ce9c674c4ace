#!/usr/bin/env bash
# Builds the documents in English and Chinese into site/ (or $1); any warning is an error. Needs `pip install -e '.[docs]'`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
site=$(realpath -m "${1:-site}")

export NO_MKDOCS_2_WARNING=1
python -m mkdocs build --strict --clean --site-dir "$site"
python -m mkdocs build --strict --clean --config-file mkdocs.zh.yml --site-dir "$site/zh"
echo "docs: $site/index.html, $site/zh/index.html"
