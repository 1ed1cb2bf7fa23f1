#!/bin/sh
# System programs that make needs: a broker with its command-line clients, openssl for the tests' certificates, Prometheus for
# those of the metrics, a browser for those of the console, PostgreSQL for those of replicas, and a compiler for the CPU
# attention kernel.
# As root on a Debian-like system they are installed when missing; elsewhere this says what to install.
set -eu

missing=""
PATH="$PATH:/usr/sbin:/usr/local/sbin"
command -v mosquitto >/dev/null || missing="$missing mosquitto"
command -v mosquitto_pub >/dev/null || missing="$missing mosquitto-clients"
command -v openssl >/dev/null || missing="$missing openssl"
command -v promtool >/dev/null && command -v prometheus >/dev/null || missing="$missing prometheus"
command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || missing="$missing chromium"
command -v postgres >/dev/null || ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || missing="$missing postgresql"
command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || missing="$missing g++"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing$missing"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # Ours run on ports of their own, so no daemon is to be started with its package: policy-rc.d(8), 101 forbids it.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        trap 'exit 1' INT TERM
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    # shellcheck disable=SC2086 # a list of words
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
    exit 0
fi
echo "not found:$missing"
echo "Install with your package manager, for instance: sudo apt install$missing"
echo "Without them the broker is fetched by itself on Debian, attention falls back to plain torch, and a few tests fail."
