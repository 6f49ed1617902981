#!/usr/bin/env bash
# Installs what tests use besides what `make setup` installs, where it is missing and can be installed: Ray (of which a user of one machine
# has no need, and which takes half a minute), and from Debian Chromium with its driver, which opens the report's page and the console, and
# the broker that decisions are sent to. Never fails: tests without them are skipped and say so. $1 is the Python that gets Ray.
set -u
"$1" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("ray"))' || {
    echo "installing Ray for tests"
    timeout 600 "$1" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt 'ray[data]' ||
        echo "not installed; the test that needs it is skipped"
}
missing=()
command -v chromium >/dev/null && command -v chromedriver >/dev/null || missing+=(chromium chromium-driver fonts-dejavu-core)
command -v mosquitto >/dev/null || [ -x /usr/sbin/mosquitto ] || missing+=(mosquitto)
[ ${#missing[@]} -gt 0 ] || exit 0
[ "$(id -u)" = 0 ] && [ -e /etc/debian_version ] && command -v apt-get >/dev/null || exit 0
echo "installing ${missing[*]} for tests"
export DEBIAN_FRONTEND=noninteractive
timeout 600 sh -c 'apt-get update && apt-get install -y --no-install-recommends "$@"' sh "${missing[@]}" >/dev/null 2>&1 ||
    echo "not installed; the tests that need it are skipped"
exit 0
