#!/bin/sh
# Installs what cake needs to build and is not there yet. Does nothing when nothing is missing.
#
#   dev/setup.sh         what `make all` and `make test` need
#   dev/setup.sh --all   and what `make test-all` and .ci/run need: clang with its OpenMP, clang-format
set -eu

# package:what it brings (a header, or a command)
needs="g++:g++ make:make doctest-dev:doctest/doctest.h libcli11-dev:CLI/CLI.hpp
nlohmann-json3-dev:nlohmann/json.hpp libsimdjson-dev:simdjson.h libxxhash-dev:xxhash.h
zlib1g-dev:zlib.h libzstd-dev:zstd.h libedit-dev:histedit.h libgumbo-dev:gumbo.h
libcld2-dev:cld2/public/compact_lang_det.h libpsl-dev:libpsl.h
libuchardet-dev:uchardet/uchardet.h libdivsufsort-dev:divsufsort64.h libsnappy-dev:snappy.h
libcpp-httplib-dev:httplib.h pkgconf:pkg-config"

if [ "${1:-}" = --all ]; then
  needs="$needs clang:clang++ libomp-dev:omp.h clang-format-14:clang-format-14"
elif [ $# -gt 0 ]; then
  echo "error: found $1, expected --all or nothing" >&2
  exit 1
fi

present() { # PACKAGE WHAT
  if command -v dpkg-query >/dev/null; then
    dpkg-query -W -f='${Status}' "$1" 2>/dev/null | grep -q 'ok installed' && return 0
  fi
  case $2 in
    *.h | *.hpp) [ -e "/usr/include/$2" ] || [ -e "/usr/local/include/$2" ] ||
      [ -e "/opt/homebrew/include/$2" ] ;;
    *) command -v "$2" >/dev/null ;;
  esac
}

missing=
for need in $needs; do
  present "${need%%:*}" "${need#*:}" || missing="$missing ${need%%:*}"
done
if [ -z "$missing" ]; then
  version=$(g++ -dumpversion 2>/dev/null || echo 12)
  [ "${version%%.*}" -ge 12 ] ||
    echo "note: found g++ $version, expected 12 or newer: install one, then make CXX=g++-12"
  exit 0
fi

if ! command -v apt-get >/dev/null; then
  echo "error: missing:$missing (Debian's names): install them with this system's packages" >&2
  exit 1
fi
if [ "$(id -u)" = 0 ]; then
  sudo=
elif command -v sudo >/dev/null; then
  sudo=sudo
else
  echo "error: missing:$missing: as root, run: apt-get install$missing" >&2
  exit 1
fi
echo "dev/setup.sh: installing$missing${sudo:+ (with sudo)}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# A stale list still serves when the update fails; the installation decides.
$sudo apt-get update -q >"$log" 2>&1 || true
# shellcheck disable=SC2086  # the packages are several words
if ! $sudo env DEBIAN_FRONTEND=noninteractive \
  apt-get install -y -q --no-install-recommends $missing >>"$log" 2>&1; then
  cat "$log" >&2
  echo "error: apt-get could not install$missing" >&2
  exit 1
fi
echo "dev/setup.sh: done"
