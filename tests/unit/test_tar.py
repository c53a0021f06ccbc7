"""Tar archives against Python's own tarfile, and against what is broken or hostile."""

import io
import itertools
import tarfile
import time

import pytest

from meshlm.formats.byte_source import ByteSource, DamagedStreamError, RefusedStreamError
from meshlm.formats.tar import FILE, FOLDER, is_header, tar_members

CONTENT = b"".join(b"line %d of some text\n" % i for i in range(400))


def chunked(data: bytes, size: int):
    return (data[start : start + size] for start in range(0, len(data), size))


LONG = "d" * 90 + "/" + "é" * 90


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("long_name", [True, False])
def test_tar_members_equal_tarfile(kind, long_name):
    contents = {"a.txt": b"one", "dir/b": b"x" * 512, "empty": b"", "c": CONTENT[:5000]}
    contents |= {LONG if kind != tarfile.USTAR_FORMAT else "p" * 90 + "/" + "q" * 90: b"long"}
    contents = contents if long_name else dict(list(contents.items())[:-1])
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member_type in (tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("../odd")
            member.type, member.linkname = member_type, "/etc/passwd"
            archive.addfile(member)
    found = tar_members(ByteSource(chunked(buffer.getvalue(), 100)))
    found = ((one.name, one.kind, b"".join(one.chunks())) for one in found)
    assert {name: data for name, kind, data in found if kind == FILE} == contents


def _tar(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def test_a_damaged_tar_header_is_no_end():
    data = bytearray(_tar(a=b"one", b=b"two"))
    data[1024 + 5] ^= 1
    with pytest.raises(DamagedStreamError, match="checksum"):
        list(tar_members(ByteSource(iter([bytes(data)]))))
    with pytest.raises(EOFError):
        list(tar_members(ByteSource(iter([_tar(a=b"one")[:1024]]))))


def _header(size: bytes, kind: bytes) -> bytes:
    head = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    head[124:136], head[156:157], head[148:156] = size.ljust(12, b"\0"), kind, b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def _pax(records: bytes) -> bytes:
    padding = bytes(-len(records) % 512)
    return _header(b"%o" % len(records), b"x") + records + padding + _header(b"0", b"0")


@pytest.mark.parametrize(
    "data",
    [
        _header(b"-1", b"0"),
        _header(b"-1000", b"x"),
        _header(b"1_0", b"0"),
        _pax(b"11 size=-1\n"),
        _pax(b"12 size=1_0\n"),
        _pax(b"9" * 5000 + b" size=1\n"),
        _pax(b"5008 size=" + b"9" * 4997 + b"\n"),
        _pax(b"0 size=1\n"),
        _pax(b"99 size=1\n"),
    ],
)
def test_tar_sizes_that_are_no_sizes(data):
    members = tar_members(ByteSource(iter([data + bytes(2048)])))
    parts = (part for member in members for part in member.chunks())
    with pytest.raises(DamagedStreamError, match="malformed"):
        list(itertools.islice(parts, 9))  # a wrong size gave parts without end


def test_sparse_members_are_refused():
    for data in (_header(b"0", b"S"), _pax(b"22 GNU.sparse.major=1\n")):
        with pytest.raises(RefusedStreamError, match="member x is a sparse file"):
            list(tar_members(ByteSource(iter([data + bytes(1024)]))))


def test_pax_headers_take_linear_time():
    def cpu_s(count: int) -> float:
        data, began_s = _pax(b"6 a=b\n" * count) + bytes(1024), time.process_time()
        assert len(list(tar_members(ByteSource(iter([data]))))) == 1
        return time.process_time() - began_s

    short, long = (min(cpu_s(count) for _ in range(5)) for count in (40_000, 80_000))
    assert long < 3 * short


def test_a_huge_tar_header_is_refused():
    member = tarfile.TarInfo("x")
    member.size, member.type = 1 << 50, b"x"
    header = member.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(DamagedStreamError, match="tar header of"):
        list(tar_members(ByteSource(iter([header]))))


def test_what_is_stated_in_base_256():
    def size(field: bytes) -> int:
        (member,) = itertools.islice(tar_members(ByteSource(iter([_header(field, b"0")]))), 1)
        return member.num_bytes

    assert size(b"\x80" + (1 << 40).to_bytes(11, "big")) == 1 << 40
    for field in (b"\xff" * 12, b"\xff" * 11 + b"\x00", b"\x80" + b"\xff" * 11, b"\xc0" * 12):
        with pytest.raises(DamagedStreamError, match="malformed number"):
            size(field)


@pytest.mark.parametrize("field", [b"\xff" * 12, b"-1", b"-0", b"+1", b"1 1", b"8", b"\xd9\xa1"])
@pytest.mark.parametrize("kind", [b"0", b"L", b"K", b"x", b"g", b"5", b"Z"])
def test_a_size_that_is_no_size_in_a_header_of_any_type(field, kind):
    data = _header(field, kind) + bytes(4096)
    with pytest.raises(DamagedStreamError, match="malformed number"):
        list(tar_members(ByteSource(iter([data]))))


def _of_bytes(name: bytes, signed: bool) -> bytes:
    """A header whose checksum adds the bytes as numbers with or without a sign."""
    head = bytearray(_header(b"0", b"0"))
    head[: len(name)], head[148:156] = name, b" " * 8
    total = sum(head) - (256 * sum(byte >= 0x80 for byte in head) if signed else 0)
    head[148:156] = b"%06o\0 " % total
    return bytes(head)


@pytest.mark.parametrize("signed", [True, False])
def test_checksums_of_signed_bytes_are_good_too(signed):
    header = _of_bytes("naïve.txt".encode(), signed)
    (member,) = tar_members(ByteSource(iter([header + bytes(1024)])))
    assert member.name == "naïve.txt"
    assert is_header(header)
    with tarfile.open(fileobj=io.BytesIO(header + bytes(1024))) as archive:
        assert archive.getnames() == ["naïve.txt"]
    wrong = header[:148] + b"%06o\0 " % (int(header[148:154], 8) + 256) + header[156:]
    assert not is_header(wrong)
    with pytest.raises(DamagedStreamError, match="checksum"):
        list(tar_members(ByteSource(iter([wrong + bytes(1024)]))))


def _names(data: bytes) -> list[tuple[str, bytes, int]]:
    members = tar_members(ByteSource(chunked(data, 700)))
    return [(one.name, one.kind, len(b"".join(one.chunks()))) for one in members]


def test_a_pax_size_is_that_of_the_member_and_of_no_header_before_it():
    name = b"long".ljust(200, b"g") + b"\0"
    long_name = _header(b"%o" % len(name), b"L") + name.ljust(512, b"\0")
    records = b"10 size=7\n"
    pax = _header(b"%o" % len(records), b"x") + records.ljust(512, b"\0")
    file = _header(b"0", b"0") + b"content".ljust(512, b"\0")
    wanted = [(name[:-1].decode(), FILE, 7)]
    assert _names(pax + long_name + file + bytes(1024)) == wanted
    assert _names(long_name + pax + file + bytes(1024)) == wanted
    # Of all members, a name or a size makes no sense.
    everywhere = _header(b"%o" % len(records), b"g") + records.ljust(512, b"\0")
    assert _names(everywhere + _header(b"0", b"0") + bytes(1024)) == [("x", FILE, 0)]


def test_what_has_no_content_has_none_whatever_its_size():
    for kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
        data = _header(b"1000", kind) + _header(b"0", b"7") + bytes(1024)
        assert _names(data) == [("x", kind, 0), ("x", FILE, 0)]
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            assert len(archive.getmembers()) == 2


def test_a_folder_of_the_oldest_tars():
    data = _of_bytes(b"folder/", signed=False)
    data = data[:156] + b"\0" + data[157:]
    data = data[:148] + b"%06o\0 " % (int(data[148:154], 8) - ord("0")) + data[156:]
    assert _names(data + bytes(1024)) == [("folder/", FOLDER, 0)]


def test_a_header_without_its_member_is_damage():
    for data in (_header(b"4", b"L") + b"abc\0".ljust(512, b"\0"), _pax(b"10 path=a\n")[:1024]):
        with pytest.raises(DamagedStreamError, match="has no member"):
            list(tar_members(ByteSource(iter([data + bytes(1024)]))))


def test_a_pax_record_ends_with_its_line():
    with pytest.raises(DamagedStreamError, match="malformed pax"):
        list(tar_members(ByteSource(iter([_pax(b"9 path=a\0") + bytes(1024)]))))


def test_a_sparse_file_is_named_in_one_line():
    with pytest.raises(RefusedStreamError, match=r"member 'a\\nb' is a sparse file"):
        list(tar_members(ByteSource(iter([_pax(b"12 path=a\nb\n22 GNU.sparse.major=1\n")]))))


@pytest.mark.parametrize(
    "piece",
    [
        bytes(1 << 20),
        # An end after each member: what is skipped there is not copied for each of them.
        (_header(b"0", b"0") + bytes(512)) * 2000,
        _pax(b"10 path=a\n") * 500,
        (_header(b"4", b"L") + b"abc\0".ljust(512, b"\0")) * 1000,
    ],
    ids=["zeros after the end", "ends", "pax headers", "long names"],
)
def test_twice_as_much_takes_twice_as_long(piece):
    def cpu_s(count: int) -> float:
        start = _header(b"0", b"0") if piece.strip(b"\0") else bytes(512)
        data = start + piece * count + start + bytes(1024)
        best = float("inf")
        for _ in range(5):
            began_s = time.process_time()
            for _ in tar_members(ByteSource(chunked(data, 1 << 18))):
                pass
            best = min(best, time.process_time() - began_s)
        return best

    assert cpu_s(8) < 3 * cpu_s(4) + 0.002
