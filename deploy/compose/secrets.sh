#!/bin/sh
# Makes what compose.yaml's containers prove themselves with, in the folder secrets beside it: an authority, certificates for the
# broker and the service, passwords for the tenant alice and for Grafana's admin. docs/security.md says how to make more.
# Needs openssl and mosquitto_passwd.
set -eu
umask 077
cd "$(dirname "$0")"
mkdir secrets # fails when there are some: they would no longer match what was handed out
cd secrets

key="-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
# certify NAME EXTENSION...: NAME.key and NAME.crt
certify() {
    name=$1
    shift
    # shellcheck disable=SC2086 # a list of words
    openssl req $key -keyout "$name.key" -out "$name.csr" -subj "/CN=$name" -addext basicConstraints=critical,CA:FALSE "$@"
    openssl x509 -req -in "$name.csr" -out "$name.crt" -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -copy_extensions copy
}
# shellcheck disable=SC2086
openssl req -x509 $key -keyout ca.key -out ca.crt -days 3650 -subj "/CN=tokenbus authority"
certify server -addext extendedKeyUsage=serverAuth -addext subjectAltName=DNS:broker,DNS:localhost,IP:127.0.0.1
certify _service -addext extendedKeyUsage=clientAuth

openssl rand -hex 24 > grafana
openssl rand -hex 24 > alice.password
touch passwords
mosquitto_passwd -b passwords alice "$(cat alice.password)"

# The containers' users are neither root nor the owner, and each sees only the files that are mounted for it. On this machine
# the folder keeps the others out.
chmod 644 ca.crt server.crt server.key passwords _service.crt _service.key grafana
