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
# A folder for each list of files and hub: what another build has brought is not this one's data.
app=/opt/nanochat/app
key=$(cat "$app/configs/$config.toml" "$app/nanochat/data.lock.json" - <<END | sha256sum | cut -c 1-16
${HF_ENDPOINT:-}
END
)
folder=$folder/$config-$key
/opt/nanochat/bin/nanochat fetch "@configs/$config.toml" --to "$folder"
mkdir -p "$target"
cp -R "$folder/." "$target/"
# Readable by any --user, writable by none.
chmod -R a+rX,a-w "$target"
