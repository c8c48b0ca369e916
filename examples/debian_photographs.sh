#!/usr/bin/env bash
# Fetch the Debian packages with photographs that examples/objects.py uses, 380 MB, and unpack them into a folder:
#   examples/debian_photographs.sh photographs
# Nothing is installed, and no root is needed. Needs Debian or Ubuntu (apt-get download, dpkg-deb).
set -euo pipefail
folder=${1:?"usage: debian_photographs.sh FOLDER"}
packages="tuxpaint-stamps-default gnome-backgrounds mate-backgrounds plasma-workspace-wallpapers ukui-wallpapers
  lomiri-wallpapers-16.04 lomiri-wallpapers-20.04"

archives=$(mktemp -d)
trap 'rm -rf "$archives"' EXIT
mkdir -p "$folder"
for package in $packages; do
  (cd "$archives" && apt-get download "$package")
done
for archive in "$archives"/*.deb; do
  dpkg-deb --extract "$archive" "$folder"
done
echo "unpacked into $folder; licences: $folder/usr/share/doc/*/copyright"
