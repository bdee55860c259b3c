"""The cloud in a box: RunPod's API on this machine, whose pods are containers with sshd.

    with Cloud(image) as cloud:                     # tests/twin/runpod/cloud.py
        env = cloud.client_env(home)                # HOME, proxy and CA of an unmodified client
        subprocess.run([SKY, "launch", ...], env=env)
        cloud.account.pods                          # what exists, was billed, and how it ended
        cloud.account.faults["deploy"] = Fault(times=4, message="no longer any instances available")
        cloud.account.preempt(pod_id)               # vanishes; exit_pod: EXITED
        cloud.engine.run(pod.container, "kill", "-STOP", "7")   # a hang
        cloud.account.fails_to_boot["cpu3c-2-4"] = 1   # a broken host; boot_s: slow; dearer: prices
        cloud.account.spent_usd()                   # by the emulator's own ledger, in seconds

* GraphQL of api.runpod.io, volumes of rest.runpod.io/v1, and SkyPilot's catalog.
* Two doors: RUNPOD_API_BASE_URL=cloud.url (GraphQL and /v1), or all three hosts by HTTPS_PROXY with
  a CA of its own (`client_env`): the client and its URLs are then unmodified.
* `python -m tests.twin.runpod IMAGE` serves until Ctrl-C, with control by HTTP: GET /_emu/state,
  POST /_emu/fault {"operation", "times", "message"}, /_emu/preempt, /_emu/exit, /_emu/price.
* Every call stands in `account.calls` with the address that it came from.
"""
