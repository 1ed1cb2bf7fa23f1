#!/bin/sh
# System programs that make needs: a broker with its command-line clients, openssl for the tests' certificates, a compiler
# for the CPU attention kernel, and PostgreSQL for the tests of replicas.
# As root on a Debian-like system they are installed when missing; elsewhere this says what to install.
set -eu

missing=""
PATH="$PATH:/usr/sbin:/usr/local/sbin"
command -v mosquitto >/dev/null || missing="$missing mosquitto"
command -v mosquitto_pub >/dev/null || missing="$missing mosquitto-clients"
command -v openssl >/dev/null || missing="$missing openssl"
command -v postgres >/dev/null || ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || missing="$missing postgresql"
command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || missing="$missing g++"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing$missing"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    case "$missing" in *postgresql*)
        # The tests make clusters of their own; installing the server shall start none.
        mkdir -p /etc/postgresql-common
        [ -e /etc/postgresql-common/createcluster.conf ] ||
            echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
        ;;
    esac
    # shellcheck disable=SC2086 # a list of words
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
    exit 0
fi
echo "not found:$missing"
echo "Install with your package manager, for instance: sudo apt install$missing"
echo "Without them the broker is fetched by itself on Debian, attention falls back to plain torch, and a few tests fail."
