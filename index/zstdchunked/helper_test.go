package zstdchunked

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	upstream "github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/indextest"
)

func members() []indextest.Member {
	when := time.Unix(1700000000, 123456789)
	big := indextest.Noise(300_000, 1)
	holed := append(append(indextest.Noise(5000, 2), make([]byte, 9000)...), indextest.Noise(7000, 3)...)
	return []indextest.Member{
		{H: tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: when}},
		{H: tar.Header{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o1777, ModTime: time.Unix(-5, 0)}},
		{H: tar.Header{Name: "bin/su", Mode: 0o4755, ModTime: when, Uid: 4000000000, Gid: 7, PAXRecords: map[string]string{
			"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\xff\x00",
			"SCHILY.xattr.user.empty":          "x",
		}}, Data: []byte("hello")},
		{H: tar.Header{Name: "bin/big", Mode: 0o644, ModTime: when}, Data: big},
		{H: tar.Header{Name: "bin/copy", Mode: 0o644, ModTime: when}, Data: big},
		{H: tar.Header{Name: "holes", Mode: 0o600, ModTime: when}, Data: holed},
		{H: tar.Header{Name: "zeros", Mode: 0o600, ModTime: when}, Data: make([]byte, 70_000)},
		{H: tar.Header{Name: "empty", Mode: 0o600, ModTime: when}},
		{H: tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "../bin/su", Mode: 0o777, ModTime: when}},
		{H: tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "./bin/su", Mode: 0o4755, ModTime: when}},
		{H: tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 300, Mode: 0o666, ModTime: when}},
		{H: tar.Header{Name: "disk", Typeflag: tar.TypeBlock, Devmajor: 300, Devminor: 1, Mode: 0o660, ModTime: when}},
		{H: tar.Header{Name: "pipe", Typeflag: tar.TypeFifo, Mode: 0o600, ModTime: when}},
		{H: tar.Header{Name: "bin/.wh.gone", Mode: 0o600, ModTime: when}},
	}
}

type stargzCompression struct {
	*upstream.Decompressor
	*upstream.Compressor
}

// writeStargz writes a blob as stargz-snapshotter's converter does.
func writeStargz(t testing.TB, tarball []byte, o ...estargz.Option) ([]byte, map[string]string) {
	t.Helper()
	meta := map[string]string{}
	o = append(o, estargz.WithCompression(&stargzCompression{
		new(upstream.Decompressor), &upstream.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: meta},
	}))
	b, err := estargz.Build(io.NewSectionReader(bytes.NewReader(tarball), 0, int64(len(tarball))), o...)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	data, err := io.ReadAll(b)
	if err != nil {
		t.Fatal(err)
	}
	meta[jsonDigest] = b.TOCDigest().String()
	return data, meta
}

// writeContainers writes a blob as containers/storage does, with the chunks of a
// file at every run of at least 1 KiB of zeroes and at most most bytes long.
func writeContainers(t testing.TB, tarball []byte, most int) ([]byte, map[string]string) {
	t.Helper()
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	var blob bytes.Buffer
	frame := func(p []byte) { blob.Write(enc.EncodeAll(p, nil)) }
	skippable := func(p []byte) {
		blob.WriteString("\x50\x2a\x4d\x18")
		blob.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(p))))
		blob.Write(p)
	}
	type obj = map[string]any
	var entries []obj
	counter := &counted{r: bytes.NewReader(tarball)}
	tr := tar.NewReader(counter)
	var from int64
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		frame(tarball[from:counter.n])
		from = counter.n
		types := map[byte]string{tar.TypeReg: "reg", tar.TypeLink: "hardlink", tar.TypeSymlink: "symlink",
			tar.TypeChar: "char", tar.TypeBlock: "block", tar.TypeDir: "dir", tar.TypeFifo: "fifo"}
		e := obj{"type": types[h.Typeflag], "name": h.Name, "linkName": h.Linkname, "mode": h.Mode, "size": h.Size,
			"uid": h.Uid, "gid": h.Gid, "modtime": h.ModTime, "accesstime": h.ModTime, "devMajor": h.Devmajor, "devMinor": h.Devminor}
		xs := map[string]string{}
		for k, v := range h.PAXRecords {
			if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
				xs[name] = base64.StdEncoding.EncodeToString([]byte(v))
			}
		}
		e["xattrs"] = xs
		own := []obj{e}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		from += int64(len(data))
		if len(data) > 0 {
			e["digest"] = digest.FromBytes(data).String()
			e["offset"] = blob.Len()
			parts := splitZeros(data, most)
			at := 0
			for i, p := range parts {
				if len(parts) > 1 {
					c := e
					if i > 0 {
						c = obj{"type": "chunk", "name": h.Name}
						own = append(own, c)
					}
					c["offset"], c["chunkOffset"], c["chunkSize"] = blob.Len(), at, len(p)
					c["chunkDigest"] = digest.FromBytes(p).String()
					if len(bytes.Trim(p, "\x00")) == 0 {
						c["chunkType"] = "zeros"
					}
				}
				frame(p)
				at += len(p)
			}
			e["endOffset"] = blob.Len()
		}
		entries = append(entries, own...)
	}
	frame(tarball[from:])
	toc, err := json.Marshal(obj{"version": 1, "entries": entries, "tarSplitDigest": digest.FromString("x")})
	if err != nil {
		t.Fatal(err)
	}
	z := enc.EncodeAll(toc, nil)
	meta := map[string]string{
		containersPrefix + checksumSuffix: digest.FromBytes(z).String(),
		containersPrefix + positionSuffix: fmt.Sprintf("%d:%d:%d:1", blob.Len()+8, len(z), len(toc)),
	}
	skippable(z)
	skippable([]byte("tar-split"))
	skippable(make([]byte, 64))
	return blob.Bytes(), meta
}

func splitZeros(p []byte, most int) (parts [][]byte) {
	for len(p) > 0 {
		run := len(p) - len(bytes.TrimLeft(p, "\x00"))
		n := run
		if run < 1024 {
			for n = 1; n < len(p) && n < most; n++ {
				if rest := p[n:]; len(rest) >= 1024 && len(bytes.Trim(rest[:1024], "\x00")) == 0 {
					break
				}
			}
		}
		parts = append(parts, p[:n])
		p = p[n:]
	}
	return parts
}

func readBlob(t testing.TB, blob []byte, annotations map[string]string) *index.Layer {
	t.Helper()
	p, ok, err := FromAnnotations(annotations)
	if err != nil || !ok {
		t.Fatalf("FromAnnotations: %v, %v", ok, err)
	}
	size := int64(len(blob))
	if err := p.Check(size); err != nil {
		t.Fatal(err)
	}
	l, err := Read(bytes.NewReader(blob[p.Offset:p.Offset+p.Length]), p, size)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// checkChunks decompresses every frame from its own range of the blob alone and
// compares every piece with its digest.
func checkChunks(t testing.TB, blob []byte, l *index.Layer) {
	t.Helper()
	if err := l.Frames.Verify(); err != nil {
		t.Fatal(err)
	}
	frames, _, _ := l.Frames.Len()
	for i := range frames {
		f := l.Frames.Frame(i)
		dec, err := zstd.NewReader(bytes.NewReader(blob[f.Offset : f.Offset+f.Length]))
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(dec)
		dec.Close()
		if err != nil {
			t.Fatalf("frame %d: %v", i, err)
		}
		for _, p := range l.Frames.FramePieces(i) {
			if p.Inner+p.Size > int64(len(data)) || sha256.Sum256(data[p.Inner:p.Inner+p.Size]) != p.Digest {
				t.Fatalf("frame %d (%+v of %d bytes): piece %+v differs", i, f, len(data), p)
			}
		}
	}
}

// checkTar compares entries and contents with the tar in the blob. Entries for
// which hidden is true must not be there.
func checkTar(t testing.TB, blob []byte, l *index.Layer, hidden func(string) bool) {
	t.Helper()
	dec, err := zstd.NewReader(bytes.NewReader(blob))
	if err != nil {
		t.Fatal(err)
	}
	defer dec.Close()
	tr := tar.NewReader(dec)
	i := 0
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if hidden != nil && hidden(h.Name) {
			continue
		}
		if i >= len(l.Entries) {
			t.Fatalf("%q is missing", h.Name)
		}
		e := l.Entries[i]
		i++
		name, _ := index.Clean(h.Name)
		if e.Name != name || e.UID != uint32(h.Uid) || !e.HardLink && e.Mode&0o7777 != uint32(h.Mode)&0o7777 || e.Mtime != h.ModTime.Round(time.Second).Unix() && e.Mtime != h.ModTime.Unix() {
			t.Fatalf("entry %+v, tar has %+v", e, h)
		}
		for _, x := range e.Xattrs {
			if h.PAXRecords["SCHILY.xattr."+x.Name] != string(x.Value) {
				t.Fatalf("%q: xattr %q is %q", e.Name, x.Name, x.Value)
			}
		}
		if h.Typeflag != tar.TypeReg || h.Size == 0 {
			continue
		}
		want, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		from, to := l.Frames.PiecesIn(e.Data, e.Size)
		for k := from; k < to; k++ {
			p := l.Frames.Piece(k)
			at := p.Data - e.Data
			if sha256.Sum256(want[at:at+p.Size]) != p.Digest {
				t.Fatalf("%q: piece at %d differs", e.Name, at)
			}
			copy(got[at:], want[at:at+p.Size])
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("%q: pieces leave out bytes that are not zero", e.Name)
		}
	}
	if i != len(l.Entries) {
		t.Fatalf("%d entries, tar has %d", len(l.Entries), i)
	}
}
