# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# The image: made from nothing, with secrets that must not stay in it. Sourced by images.sh.
: "${work:?}" "${CACHE:?}" "${IMAGE:?}" "${PYTHON:?}" "${USER_ID:?}"

make_base_image() {
    if [[ ! -s $CACHE/base.tar ]]; then
        say 'base image: mmdebstrap, Debian 12'
        mmdebstrap --quiet --variant=minbase --include=ca-certificates bookworm "$work/base.tar"
        mv "$work/base.tar" "$CACHE/base.tar"
    fi
    say "base image: $(megabytes "$(stat -c %s "$CACHE/base.tar")") as a tar"
}

# fetch_wheels: by this machine's pip with its settings; the image's pip sees only what is fetched here.
fetch_wheels() {
    local asked
    asked=$(cat pyproject.toml launch/constraints.txt "${BASH_SOURCE[0]}" | sha256sum)
    if [[ $(cat "$CACHE/wheels/asked" 2>/dev/null) != "$asked" ]]; then
        "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
            fail "wheels for Debian 12 need Python 3.11; '$PYTHON' is $("$PYTHON" -V). Name one: PYTHON=python3.11"
        say "wheels: pip download with this machine's settings"
        rm -rf "$CACHE/wheels"
        "$PYTHON" -m pip --quiet --disable-pip-version-check download -c launch/constraints.txt -d "$CACHE/wheels" \
            '.[train,deepspeed,mpi]' setuptools wheel hatchling ninja packaging psutil py-cpuinfo 2>"$work/pip.log" || {
            tail -n 20 "$work/pip.log" >&2
            fail 'pip must fetch what pyproject.toml asks for; its last lines are above.'
        }
        # Ours comes from the repository.
        rm -f "$CACHE"/wheels/flora_dist*
        printf '%s\n' "$asked" >"$CACHE/wheels/asked"
    fi
    say "wheels: $(find "$CACHE/wheels" -type f | wc -l), $(megabytes "$(du -sb "$CACHE/wheels" | cut -f 1)")"
}

# serve_wheels: behind a password and a certificate of an authority that only the secrets know.
serve_wheels() {
    (
        cd "$work" || exit
        openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj '/CN=flora-images' -addext 'subjectAltName=IP:127.0.0.1' \
            -keyout server.key -out ca_bundle
    ) 2>/dev/null
    password=$(openssl rand -hex 16)
    "$PYTHON" tests/cluster/images_wheels.py "$CACHE/wheels" "$work/ca_bundle" "$work/server.key" "flora:$password" "$work/port" &
    wheel_server=$!
    for _ in {1..50}; do
        [[ -s $work/port ]] && break
        sleep 0.1
    done
    printf '[global]\nno-index = true\nfind-links = https://flora:%s@127.0.0.1:%d/\n' "$password" "$(<"$work/port")" >"$work/pip_conf"
}

make_keys() {
    mkdir "$work/keys"
    ssh-keygen -q -t ed25519 -N '' -C flora -f "$work/keys/client_key"
    ssh-keygen -q -t ed25519 -N '' -C flora -f "$work/keys/host_key"
    chown -R "$USER_ID:$USER_ID" "$work/keys"
    chmod 711 "$work"
}

# build_image: the engine shares this machine's network, and makes none of its own.
build_image() {
    local started=$SECONDS
    serve_wheels
    make_keys
    start_engine shared --bridge none --iptables=false --ip-forward=false --ip-masq=false
    "$DOCKER" import "$CACHE/base.tar" flora-base:bookworm >/dev/null
    build --tag "$IMAGE" >"$work/build.log" 2>&1 || {
        tail -n 40 "$work/build.log" >&2
        fail "'docker build' must succeed; its last lines are above."
    }
    say "docker build: $((SECONDS - started)) s"
    started=$SECONDS
    build --build-arg VERSION=rebuilt --tag flora-dist:again >/dev/null 2>&1 || fail 'the second build must succeed.'
    say "docker build once more, layers kept: $((SECONDS - started)) s"
    "$DOCKER" image rm --no-prune flora-dist:again >/dev/null
    kill "$wheel_server"
    wheel_server=''
}

build() {
    "$DOCKER" build --progress plain --network host --build-arg BASE_IMAGE=flora-base:bookworm --build-arg "USER_ID=$USER_ID" \
        --secret "id=pip_conf,src=$work/pip_conf" --secret "id=ca_bundle,src=$work/ca_bundle" -f docker/Dockerfile "$@" .
}

# check_image: what it says of itself, and what must not be in it.
check_image() {
    [[ $(inspect_image .Config.User) == "$USER_ID" ]] || fail "the image's user must be $USER_ID; it is '$(inspect_image .Config.User)'."
    [[ $(inspect_image .Config.Healthcheck.Test) == *healthcheck.sh* ]] || fail 'the image must have a healthcheck.'
    "$DOCKER" save "$IMAGE" -o "$work/image.tar"
    "$DOCKER" history --no-trunc "$IMAGE" >"$work/history"
    "$PYTHON" tests/cluster/images_secrets.py "$work/image.tar" "$work/history" -- \
        "$work/pip_conf" "$work/ca_bundle" "$work/server.key" "$work/keys/client_key" "$work/keys/host_key" ||
        fail 'no secret may stay in the image; the lines above say where.'
    rm "$work/image.tar"
    inspect_image 'json .Config.Labels' | tr ',' '\n' | tr -d '{}"' | sed 's/^/        /'
    say "image: $(megabytes "$(inspect_image .Size)"); its layers:"
    "$DOCKER" history --format '{{.Size}}\t{{.CreatedBy}}' "$IMAGE" | grep -v '^0B' | sed 's/ # buildkit//' | cut -c 1-110 | sed 's/^/        /'
}

inspect_image() {
    "$DOCKER" inspect --format "{{$1}}" "$IMAGE"
}

megabytes() {
    printf '%d MB' "$(($1 / 1000000))"
}
