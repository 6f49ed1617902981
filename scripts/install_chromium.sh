#!/usr/bin/env bash
# Installs Debian's Chromium with its driver, which open the report's page in a test, where they are missing and can be installed.
# Never fails: without them that test is skipped, and says so.
set -u
command -v chromium >/dev/null && command -v chromedriver >/dev/null && exit 0
[ "$(id -u)" = 0 ] && [ -e /etc/debian_version ] && command -v apt-get >/dev/null || exit 0
echo "installing chromium for the test of the report's page"
export DEBIAN_FRONTEND=noninteractive
timeout 600 sh -c 'apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver fonts-dejavu-core' >/dev/null 2>&1 ||
    echo "chromium could not be installed; the test of the report's page is skipped"
exit 0
