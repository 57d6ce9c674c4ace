#!/usr/bin/env bash
# Builds what a release holds into dist/ (or $1): the sdist, the wheel made from it, and a CycloneDX list of the packages of
# this environment, which are those that the tests ran with. Needs `pip install -c constraints.txt -e '.[release]'`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dist=$(realpath -m "${1:-dist}")

python -m build --no-isolation --outdir "$dist"
python -m cyclonedx_py environment --output-reproducible --output-file "$dist/sbom.cdx.json"
echo "dist: $(ls "$dist" | tr '\n' ' ')"
