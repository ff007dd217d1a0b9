#!/bin/bash
# Fetch what the training pack is made of, with pip and apt-get (Debian 12; apt-get update needs root).
#   usage: fetch_data.sh RAW      then: python -m flashvsr_model.training.pack RAW PACK
# About 1 GB is downloaded, 3 GB used. Licences: film CC-BY 3.0 (c) 2008 Blender Foundation, www.bigbuckbunny.org;
# pictures and clips those of their Debian packages. All are for training only; nothing of them is redistributed.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 RAW" >&2; exit 2; }
mkdir -p "$1"/{download,clips,deb,source/lists/partial,source/parts}
raw=$(realpath "$1")
cd "$raw"

# The film, 1280x720, lies in a zip file in moviepy's source archive.
python3 -m pip download --quiet --no-deps --no-binary :all: --dest download moviepy==2.2.1
tar xzf download/moviepy-2.2.1.tar.gz -C download --wildcards '*/moviepy_10_minutes.zip'
unzip -oqj "$(find download -name moviepy_10_minutes.zip)" '*bbb.mp4' -d clips

# Photographs, textures and cut-outs.
apt-get update -qq
cd "$raw/deb"
apt-get download -qq lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds plasma-workspace-wallpapers \
    lxqt-themes tuxpaint-stamps-default supertuxkart-data
for package in *.deb; do dpkg -x "$package" x; done

# Two real clips from a source package. Source entries come from this system's own and are not added to it.
cd "$raw/source"
for list in /etc/apt/sources.list.d/*.sources; do
    sed 's/^Types: deb$/Types: deb-src/' "$list" >"parts/$(basename "$list")"
done
options=(-o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$raw/source/parts" \
         -o Dir::State::Lists="$raw/source/lists")
apt-get "${options[@]}" update -qq
apt-get "${options[@]}" source -qq --download-only libopenshot
tar xJf libopenshot_*.orig.tar.xz -C ../clips --strip-components=2 --wildcards \
    '*/examples/test_video.mp4' '*/examples/test.avi'
ls -l "$raw/clips"
