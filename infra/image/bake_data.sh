#!/bin/sh
# Build step: bring the data of one choice into the cache FOLDER and copy it to TARGET.
# usage: bake_data.sh smoke|cpu|d20|none|NAME-OF-A-CONFIG FOLDER TARGET
set -eu
choice=$1 folder=$2 target=$3
case "$choice" in
  none) exit ;;
  cpu) config=cpu_small ;;
  *) config=$choice ;;
esac
if [ -r /run/secrets/HF_TOKEN ]; then
  HF_TOKEN=$(cat /run/secrets/HF_TOKEN)
  export HF_TOKEN
fi
/opt/nanochat/bin/nanochat fetch "@configs/$config.toml" --to "$folder"
mkdir -p "$target"
cp -R "$folder/." "$target/"
# Readable by any --user, writable by none.
chmod -R a+rX,a-w "$target"
