#!/bin/sh
# The image's entry point: verbs go to nanochat, anything else is exec'd as it stands. RunPod and
# SkyPilot append `bash -c …` and wait for ever when it is not run.
# On a pod the dead man's switch starts before anything else, whatever the command is.
[ -z "$RUNPOD_POD_ID" ] || setsid /opt/nanochat/venv/bin/python -P -m infra.deadman </dev/null &
[ $# -gt 0 ] || set -- run @configs/smoke.toml
# In a network of its own, loopback is nobody's: `-p` says who reaches the port. The last --host wins.
# There every link but lo has its other end elsewhere; one that has not is the host's (--network host).
own_network() {
  [ -e /.dockerenv ] || [ -e /run/.containerenv ] || return 1
  for link in /sys/class/net/*; do
    [ "${link##*/}" = lo ] || [ ! -e "$link/iflink" ] \
      || [ "$(cat "$link/ifindex")" != "$(cat "$link/iflink")" ] || return 1
  done
}
if [ "$1" = serve ] && own_network; then
  shift
  set -- serve --host 0.0.0.0 "$@"
fi
case "$1" in
  -* | plan | run | launch | status | stop | reap | pull | fetch | doctor | report | compare | sync \
    | chat | serve | export) exec /opt/nanochat/bin/nanochat "$@" ;;
esac
exec "$@"
