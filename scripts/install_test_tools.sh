#!/usr/bin/env bash
# Installs what tests use besides Python packages, from Debian, where it is missing and can be installed: Chromium with its driver, which
# opens the report's page and the console, and the broker that decisions are sent to. Never fails: tests without them are skipped and say so.
set -u
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
