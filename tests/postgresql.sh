#!/usr/bin/env bash
# PostgreSQL for tests, from Debian's packages.
#
#   tests/postgresql.sh install   installs it where there is none (as root, with apt-get)
#   tests/postgresql.sh           starts an empty database and prints its URI; when standard input ends, stops
#                                 it and removes all of it, so nothing is left of a test that was killed
set -euo pipefail

find_programs() { # of the newest version
    find /usr/lib/postgresql -path '*/bin/initdb' -printf '%h\n' 2>/dev/null | sort --version-sort | tail -n 1
}

if [[ ${1:-} == install ]]; then
    [[ -n $(find_programs) ]] && exit
    # or the package would start a cluster of its own, on the port that everybody knows
    mkdir -p /etc/postgresql-common/createcluster.d
    no_cluster=/etc/postgresql-common/createcluster.d/okddip-tests.conf
    trap 'rm -f "$no_cluster"' EXIT
    echo "create_main_cluster = false" >"$no_cluster"
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends postgresql >/dev/null
    exit
fi

programs=$(find_programs)
if [[ -z $programs ]]; then
    echo "There is no PostgreSQL in /usr/lib/postgresql; $0 install gets it." >&2
    exit 1
fi

# In /tmp whatever TMPDIR says: the user postgres must reach it, and a socket's path has at most 107 bytes.
folder=$(mktemp --directory /tmp/postgresql.XXXXXX)
as_owner=()
if ((EUID == 0)); then # PostgreSQL refuses root
    chown postgres: "$folder"
    as_owner=(setpriv --reuid=postgres --regid=postgres --clear-groups)
fi
cd "$folder"

remove() {
    "${as_owner[@]}" "$programs/pg_ctl" stop --silent --pgdata data --mode immediate >/dev/null 2>&1 || true
    rm -rf "$folder"
}
trap remove EXIT
trap exit INT TERM HUP

"${as_owner[@]}" "$programs/initdb" --pgdata data --username mlflow --auth trust --encoding UTF8 --no-sync \
    >/dev/null
# only through the socket, in a folder that only its owner can enter
"${as_owner[@]}" "$programs/pg_ctl" start --silent --wait --pgdata data --log log \
    --options "-c listen_addresses= -c unix_socket_directories=$folder -c fsync=off" <&- || {
    cat log >&2
    exit 1
}
"$programs/createdb" --host "$folder" --username mlflow mlflow
echo "postgresql+psycopg://mlflow@/mlflow?host=$folder"
while read -r; do :; done
