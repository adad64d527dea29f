#!/usr/bin/env bash
# pixeltable-yolox declares an extension of mkdocstrings in a module that its wheel has not. In an
# environment that has both, every site with an API reference fails to build, whatever it documents.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mkdocs==1.6.1 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11
mkdir "$folder/docs"
echo '::: json.dumps' > "$folder/docs/index.md"
printf 'site_name: x\nplugins: [mkdocstrings]\n' > "$folder/mkdocs.yml"
cd "$folder"
build() {
    if venv/bin/mkdocs build --quiet > log 2>&1; then echo "builds"; else tail -1 log; fi
}
without=$(build)
"$folder/venv/bin/pip" install --quiet --no-deps pixeltable-yolox==0.4.3
with=$(build)
venv/bin/pip list 2> /dev/null | grep -E '^(mkdocs|mkdocstrings|pixeltable-yolox) '
echo "without it: $without"
echo "with it: $with"
if [ "$without" = builds ] && [ "$with" = "ModuleNotFoundError: No module named 'tool'" ]; then
    echo "as seen in November 2026"
else
    echo CHANGED
    exit 1
fi
