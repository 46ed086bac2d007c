#!/bin/sh
# Installs what cake needs to build and is not there yet. Does nothing when nothing is missing.
#
#   dev/setup.sh         what `make all` and `make test` need
#   dev/setup.sh --all   and what `make test-all` and .ci/run need: clang with its OpenMP, clang-format;
#                        and Chromium, without which the tests of the page are skipped
set -eu

# package:what it brings (a header, or a command)
needs="g++:g++ make:make doctest-dev:doctest/doctest.h libcli11-dev:CLI/CLI.hpp
nlohmann-json3-dev:nlohmann/json.hpp libsimdjson-dev:simdjson.h libxxhash-dev:xxhash.h
zlib1g-dev:zlib.h libzstd-dev:zstd.h libedit-dev:histedit.h libgumbo-dev:gumbo.h
libcld2-dev:cld2/public/compact_lang_det.h libpsl-dev:libpsl.h
libuchardet-dev:uchardet/uchardet.h libdivsufsort-dev:divsufsort64.h libsnappy-dev:snappy.h
libcpp-httplib-dev:httplib.h libsqlite3-dev:sqlite3.h pkgconf:pkg-config"
optional= # their lack is no error

if [ "${1:-}" = --all ]; then
  needs="$needs clang:clang++ libomp-dev:omp.h clang-format-14:clang-format-14"
  optional="chromium:chromium chromium-driver:chromedriver"
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

missing_of() { # PACKAGE:WHAT...
  for need in "$@"; do
    present "${need%%:*}" "${need#*:}" || printf ' %s' "${need%%:*}"
  done
}
# shellcheck disable=SC2086  # the packages are several words
missing=$(missing_of $needs) wanted=$(missing_of $optional)
if [ -z "$missing$wanted" ]; then
  version=$(g++ -dumpversion 2>/dev/null || echo 12)
  [ "${version%%.*}" -ge 12 ] ||
    echo "note: found g++ $version, expected 12 or newer: install one, then make CXX=g++-12"
  exit 0
fi

note_wanted() {
  [ -z "$wanted" ] || echo "note: missing:$wanted: the tests of the page in a browser are skipped"
}
if [ -z "$missing" ] && { ! command -v apt-get >/dev/null ||
  { [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; }; }; then
  note_wanted
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
echo "dev/setup.sh: installing$missing$wanted${sudo:+ (with sudo)}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# A stale list still serves when the update fails; the installation decides.
$sudo apt-get update -q >"$log" 2>&1 || true
install() {
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" >>"$log" 2>&1
}
# shellcheck disable=SC2086  # the packages are several words
if [ -n "$missing" ] && ! install $missing; then
  cat "$log" >&2
  echo "error: apt-get could not install$missing" >&2
  exit 1
fi
# shellcheck disable=SC2086
if [ -n "$wanted" ] && ! install $wanted; then note_wanted; fi
echo "dev/setup.sh: done"
