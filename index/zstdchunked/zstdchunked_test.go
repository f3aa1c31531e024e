package zstdchunked

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	upstream "github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/indextest"
)

func TestAnnotationNames(t *testing.T) {
	if upstream.ManifestChecksumAnnotation != stargzPrefix+checksumSuffix ||
		upstream.ManifestPositionAnnotation != stargzPrefix+positionSuffix ||
		estargz.TOCJSONDigestAnnotation != jsonDigest {
		t.Error("annotations are not those of the library")
	}
}

func TestContainers(t *testing.T) {
	tarball := indextest.Tar(t, tar.FormatPAX, members())
	for _, most := range []int{1 << 30, 64 << 10, 1000} {
		blob, notes := writeContainers(t, tarball, most)
		l := readBlob(t, blob, notes)
		checkChunks(t, blob, l)
		checkTar(t, blob, l, nil)
		for i := range l.Entries {
			if e := &l.Entries[i]; e.Name == "bin/su" && (e.MtimeNs != 123456789 || e.Mode&0o7777 != 0o4755) {
				t.Errorf("bin/su: %+v", e)
			} else if e.Name == "bin" && e.Mtime != -5 {
				t.Errorf("bin: %+v", e)
			}
		}
		// What the table says of ends must be used: a frame holds its chunk only.
		frames, pieces, _ := l.Frames.Len()
		if frames != pieces {
			t.Errorf("%d frames, %d pieces", frames, pieces)
		}
		for i := range frames {
			f := l.Frames.Frame(i)
			dec, _ := zstd.NewReader(bytes.NewReader(blob[f.Offset : f.Offset+f.Length]))
			n, err := io.Copy(io.Discard, dec)
			dec.Close()
			if err != nil || n != l.Frames.FramePieces(i)[0].Size {
				t.Fatalf("frame %d gives %d bytes, %v", i, n, err)
			}
		}
	}
}

func TestStargz(t *testing.T) {
	tarball := indextest.Tar(t, tar.FormatPAX, members())
	hidden := func(name string) bool { n, _ := index.Clean(name); return skip(n, 0) }
	for name, o := range map[string][]estargz.Option{
		"plain":       nil,
		"small":       {estargz.WithChunkSize(1000)},
		"min":         {estargz.WithChunkSize(5000), estargz.WithMinChunkSize(20000)},
		"prioritized": {estargz.WithPrioritizedFiles([]string{"holes", "bin/su"})},
	} {
		t.Run(name, func(t *testing.T) {
			blob, notes := writeStargz(t, tarball, o...)
			l := readBlob(t, blob, notes)
			checkChunks(t, blob, l)
			checkTar(t, blob, l, hidden)
			delete(notes, jsonDigest) // the checksum alone is enough
			readBlob(t, blob, notes)
		})
	}
}

func TestFromAnnotations(t *testing.T) {
	sum, other := digest.FromString("a").String(), digest.FromString("b").String()
	c := map[string]string{containersPrefix + checksumSuffix: sum, containersPrefix + positionSuffix: "8:2:3:1"}
	s := map[string]string{stargzPrefix + checksumSuffix: sum, stargzPrefix + positionSuffix: "8:2:3:1"}
	with := func(m map[string]string, kv ...string) map[string]string {
		m = maps.Clone(m)
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return m
	}
	both := with(c, stargzPrefix+checksumSuffix, sum, stargzPrefix+positionSuffix, "8:2:3:1")
	for name, tc := range map[string]struct {
		in   map[string]string
		want Dialect
		ok   bool
		err  string
	}{
		"none":            {in: nil},
		"estargz":         {in: map[string]string{jsonDigest: sum}},
		"containers":      {in: c, want: Containers, ok: true},
		"stargz":          {in: s, want: Stargz, ok: true},
		"stargz, json":    {in: with(s, jsonDigest, other), want: Stargz, ok: true},
		"both, same":      {in: both, want: Stargz, ok: true},
		"both, position":  {in: with(both, stargzPrefix+positionSuffix, "9:2:3:1"), err: "two zstd:chunked TOCs"},
		"both, digest":    {in: with(both, stargzPrefix+checksumSuffix, other), err: "two zstd:chunked TOCs"},
		"and estargz":     {in: with(c, jsonDigest, sum), err: "eStargz"},
		"no position":     {in: map[string]string{containersPrefix + checksumSuffix: sum}, err: "manifest-position"},
		"no checksum":     {in: map[string]string{containersPrefix + positionSuffix: "8:2:3:1"}, err: "manifest-checksum"},
		"type":            {in: with(c, containersPrefix+positionSuffix, "8:2:3:2"), err: "type 2"},
		"negative":        {in: with(c, containersPrefix+positionSuffix, "-8:2:3:1"), err: "manifest-position"},
		"huge":            {in: with(c, containersPrefix+positionSuffix, "9223372036854775808:2:3:1"), err: "manifest-position"},
		"three":           {in: with(c, containersPrefix+positionSuffix, "8:2:3"), err: "manifest-position"},
		"words":           {in: with(c, containersPrefix+positionSuffix, "8:2:3:1x"), err: "manifest-position"},
		"digest of words": {in: with(c, containersPrefix+checksumSuffix, "md5:00"), err: "no sha256"},
		"json of words":   {in: with(s, jsonDigest, "x"), err: "no sha256"},
	} {
		t.Run(name, func(t *testing.T) {
			p, ok, err := FromAnnotations(tc.in)
			if tc.err != "" {
				if !errors.Is(err, index.ErrMalformed) || !strings.Contains(err.Error(), tc.err) || ok {
					t.Errorf("got %v, %v", ok, err)
				}
				return
			}
			if err != nil || ok != tc.ok || p.Dialect != tc.want {
				t.Errorf("got %+v, %v, %v", p, ok, err)
			}
		})
	}
}

func TestReadRefuses(t *testing.T) {
	blob, notes := writeContainers(t, indextest.Tar(t, tar.FormatPAX, members()), 1<<30)
	good, _, _ := FromAnnotations(notes)
	size := int64(len(blob))
	toc := blob[good.Offset : good.Offset+good.Length]
	enc, _ := zstd.NewWriter(nil)
	pack := func(json []byte) ([]byte, Position) {
		z := enc.EncodeAll(json, nil)
		return z, Position{Offset: 8, Length: int64(len(z)), Uncompressed: int64(len(json)), Type: 1, Digest: digest.FromBytes(z)}
	}
	bomb, bombAt := pack(make([]byte, 8<<20))
	bombAt.Uncompressed = 1000
	// A frame header with a window of 2 GiB and one raw block of a byte.
	wide := []byte("\x28\xb5\x2f\xfd\x00\xa8\x09\x00\x00{")
	wideAt := Position{Offset: 8, Length: int64(len(wide)), Uncompressed: 1, Type: 1, Digest: digest.FromBytes(wide)}
	change := func(f func(*Position)) Position { p := good; f(&p); return p }
	for name, tc := range map[string]struct {
		toc  []byte
		p    Position
		size int64
		want string
	}{
		"empty":        {nil, good, size, "truncated"},
		"cut":          {toc[:len(toc)/2], good, size, "truncated"},
		"bit":          {append([]byte{toc[0] ^ 1}, toc[1:]...), good, size, "digest"},
		"offset":       {toc, change(func(p *Position) { p.Offset = size }), size, "of a blob"},
		"early":        {toc, change(func(p *Position) { p.Offset = 7 }), size, "of a blob"},
		"length":       {toc, change(func(p *Position) { p.Length = size }), size, "of a blob"},
		"small blob":   {toc, good, 3, "of a blob"},
		"uncompressed": {toc, change(func(p *Position) { p.Uncompressed++ }), size, "annotation says"},
		"less":         {toc, change(func(p *Position) { p.Uncompressed -= 5 }), size, "malformed"},
		"much":         {toc, change(func(p *Position) { p.Uncompressed = 1 << 40 }), size, "limit"},
		"json digest":  {toc, change(func(p *Position) { p.JSONDigest = digest.FromString("x") }), size, "digest"},
		"data end":     {toc, change(func(p *Position) { p.Offset = 100 }), size, "data ends"},
		"bomb":         {bomb, bombAt, size, "malformed"},
		"window":       {wide, wideAt, size, "window"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Read(bytes.NewReader(tc.toc), tc.p, tc.size); !errors.Is(err, index.ErrMalformed) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
	broken := io.MultiReader(bytes.NewReader(toc[:20]), iotest.ErrReader(errors.New("gone")))
	if _, err := Read(broken, good, size); err == nil || errors.Is(err, index.ErrMalformed) || !strings.Contains(err.Error(), "gone") {
		t.Errorf("a failing reader: %v", err)
	}
}

func FuzzRead(f *testing.F) {
	enc, _ := zstd.NewWriter(nil)
	small := []indextest.Member{members()[1], members()[2], members()[5]}
	for _, most := range []int{1 << 20, 3000} {
		blob, notes := writeContainers(f, indextest.Tar(f, tar.FormatPAX, small), most)
		p, _, _ := FromAnnotations(notes)
		dec, _ := zstd.NewReader(bytes.NewReader(blob[p.Offset : p.Offset+p.Length]))
		json, _ := io.ReadAll(dec)
		f.Add(json, p.Offset, int64(len(blob)), false)
		f.Add(json, p.Offset, int64(len(blob)), true)
		f.Add(blob[p.Offset:p.Offset+p.Length], p.Offset, int64(len(blob)), true)
	}
	f.Fuzz(func(t *testing.T, data []byte, off, size int64, raw bool) {
		z, n := data, int64(len(data))
		if !raw {
			z = enc.EncodeAll(data, nil)
		}
		p := Position{Offset: off, Length: int64(len(z)), Uncompressed: n, Type: 1, Digest: digest.FromBytes(z), Dialect: Stargz}
		start := time.Now()
		l, err := Read(bytes.NewReader(z), p, size)
		if err != nil {
			if !errors.Is(err, index.ErrMalformed) {
				t.Errorf("%v", err)
			}
			return
		}
		if err := l.Frames.Verify(); err != nil {
			t.Error(err)
		}
		if d := time.Since(start); d > time.Minute {
			t.Errorf("took %v", d)
		}
	})
}

func FuzzFromAnnotations(f *testing.F) {
	f.Add("8:2:3:1", "sha256:"+strings.Repeat("0", 64))
	f.Fuzz(func(t *testing.T, pos, sum string) {
		p, ok, err := FromAnnotations(map[string]string{containersPrefix + positionSuffix: pos, containersPrefix + checksumSuffix: sum})
		if ok && err == nil && (p.Offset < 0 || p.Length < 0 || p.Uncompressed < 0) {
			t.Error(fmt.Sprint(p))
		}
	})
}
