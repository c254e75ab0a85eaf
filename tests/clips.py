"""Real video files of many kinds, made with PyAV, without decord: their libraries of VP8 collide."""

from fractions import Fraction

import av
import numpy as np

FAST = {"crf": "12", "preset": "ultrafast", "g": "48"}


def encode(
    path,
    width=128,
    height=96,
    rate=Fraction(25),
    frames=200,
    gaps=None,
    codec="h264",
    options=FAST,
    pixels=None,
    **more,
):
    """Write a clip whose frames carry their index as 16 blocks of black and white; returns the
    seconds at which each was put. `more`: format, the muxer's options, pixels' aspect."""
    pixels = pixels or ("yuv420p" if width % 2 == height % 2 == 0 else "yuv444p")
    times, clock, tick = [], Fraction(0), 1 / rate
    with av.open(path, "w", format=more.get("format"), options=more.get("muxer", {})) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.options = options
        if "aspect" in more:
            stream.codec_context.sample_aspect_ratio = more["aspect"]
        stream.codec_context.time_base = stream.time_base = tick
        for k in range(frames):
            bits = np.array([255 * (k >> b & 1) for b in range(16)], np.uint8).reshape(4, 4)
            blocks = bits.repeat(-(-height // 4), 0).repeat(-(-width // 4), 1)[:height, :width]
            frame = av.VideoFrame.from_ndarray(np.stack([blocks] * 3, -1), format="rgb24")
            frame.time_base, frame.pts = tick, round(clock * rate)
            times.append(float(frame.pts * tick))
            clock += Fraction(gaps[k % len(gaps)]) if gaps else tick
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return times


def cut(source, path, start, end=1e9):
    """Copy packets without encoding, as `ffmpeg -ss START -to END -i SOURCE -c copy PATH` does."""
    with av.open(source) as old, av.open(path, "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        base = round(start / stream.time_base)
        old.seek(base, stream=stream, backward=True)
        for packet in old.demux(stream):
            if packet.dts is None or packet.pts * stream.time_base >= end:
                continue
            packet.pts, packet.dts, packet.stream = packet.pts - base, packet.dts - base, copy
            new.mux(packet)


def shorten(path, share):
    """Let an MP4's edit list end at a share of the clip: a phone's trim hides the rest so."""
    content = bytearray(path.read_bytes())
    at = content.index(b"elst") + 12
    length = int.from_bytes(content[at : at + 4], "big")
    content[at : at + 4] = round(share * length).to_bytes(4, "big")
    path.write_bytes(content)


def overcount(source, path):
    """Add packets that hold no picture after the last one."""
    with av.open(source) as old, av.open(path, "w") as new:
        stream = old.streams.video[0]
        copy, last = new.add_stream_from_template(stream), None
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.stream, last = copy, (packet.pts, packet.duration)
                new.mux(packet)
        for k in range(1, 11):
            packet = av.Packet(bytes.fromhex("000001b6400000"))
            packet.stream, packet.time_base = copy, stream.time_base
            packet.pts = packet.dts = last[0] + k * last[1]
            new.mux(packet)
