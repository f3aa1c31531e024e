package commit

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"
)

// packEntry is one entry of a layer, and what it holds.
type packEntry struct {
	h    tar.Header
	body []byte
}

func regular(name string, body []byte) packEntry {
	return packEntry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(body)), ModTime: time.Unix(1700000000, 0)}, body}
}

// words makes n bytes that compress as text does.
func words(r *rand.Rand, n int) []byte {
	list := strings.Fields("layer blob digest frame member chunk upper lower merged whiteout opaque commit the of a and to")
	var b bytes.Buffer
	for b.Len() < n {
		fmt.Fprintf(&b, "%s %d ", list[r.IntN(len(list))], r.IntN(1000))
	}
	return b.Bytes()[:n]
}

func noise(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// sample is a layer with everything that a layer can have, of some 20 MB.
func sample() []packEntry {
	r := rand.New(rand.NewPCG(1, 2))
	when := time.Unix(1700000001, 123456789)
	list := []packEntry{
		{h: tar.Header{Typeflag: tar.TypeDir, Name: "etc/", Mode: 0o755, Uname: "root", Gname: "root"}},
		regular("etc/empty", nil),
		regular("etc/one", []byte("1")),
		{h: tar.Header{Typeflag: tar.TypeSymlink, Name: "etc/link", Linkname: "../one", Mode: 0o777, Format: tar.FormatPAX, ModTime: when}},
		{h: tar.Header{Typeflag: tar.TypeLink, Name: "etc/hard", Linkname: "etc/one", Mode: 0o644}},
		{h: tar.Header{Name: "etc/.wh.gone"}}, // type 0
		{h: tar.Header{Name: "etc/dir0/"}},
		{h: tar.Header{Typeflag: tar.TypeReg, Name: "etc/d/.wh..wh..opq"}},
		{h: tar.Header{Typeflag: tar.TypeChar, Name: "etc/null", Mode: 0o666, Devmajor: 1, Devminor: 3}},
		{h: tar.Header{Typeflag: tar.TypeBlock, Name: "etc/loop", Mode: 0o660, Devmajor: 7, Devminor: 300, Uid: 5, Gid: 1 << 30}},
		{h: tar.Header{Typeflag: tar.TypeFifo, Name: "etc/fifo", Mode: 0o600, ModTime: time.Unix(-5, 0)}},
		regular("etc/"+strings.Repeat("é", 120), []byte("long")),
		{tar.Header{Typeflag: tar.TypeReg, Name: "etc/x", Size: 3, Mode: 0o4755, Format: tar.FormatPAX, ModTime: when, AccessTime: when,
			PAXRecords: map[string]string{"SCHILY.xattr.user.a": "\x00\xff", "SCHILY.xattr.security.capability": strings.Repeat("c", 20)}}, []byte("abc")},
	}
	for i, n := range []int{100, 60 << 10, 64 << 10, 70 << 10, mib - 1, mib, mib + 1, 2 * mib, 3*mib + 77} {
		list = append(list, regular(fmt.Sprintf("big/%02d", i), words(r, n)))
	}
	for i := range 600 {
		list = append(list, regular(fmt.Sprintf("small/%04d", i), words(r, r.IntN(6000))))
	}
	for i := range 3000 { // headers alone, more than a frame of them
		list = append(list, packEntry{h: tar.Header{Typeflag: tar.TypeSymlink, Name: fmt.Sprintf("links/%04d", i), Linkname: "x"}})
	}
	hole := words(r, 300<<10)
	clear(hole[10<<10 : 200<<10])
	clear(hole[250<<10:])
	list = append(list,
		regular("holes/mid", hole),
		regular("holes/start", hole[50<<10:]),
		regular("holes/all", make([]byte, 3*mib)),
		regular("holes/short", make([]byte, 1000)),
		regular("holes/least", make([]byte, minHole)),
		regular("same", bytes.Repeat([]byte{'x'}, 2*mib)),
		regular("noise", noise(r, 2*mib)),
	)
	return list
}

func packAll(t testing.TB, w io.Writer, list []packEntry, o PackOptions) *Packed {
	t.Helper()
	p := NewPacker(w, o)
	var err error
	for i := range list {
		h := list[i].h
		var r io.Reader
		if list[i].body != nil {
			r = bytes.NewReader(list[i].body)
			if i%3 == 0 { // bytes must not depend on how they come
				r = io.MultiReader(bytes.NewReader(list[i].body[:len(list[i].body)/3]), iotest.DataErrReader(bytes.NewReader(list[i].body[len(list[i].body)/3:])))
			}
		}
		if err = p.Add(t.Context(), &h, r); err != nil {
			break
		}
	}
	out, cerr := p.Close()
	if err != nil || cerr != nil {
		t.Fatal(err, cerr)
	}
	return out
}

// plainTar is the same as archive/tar writes it.
func plainTar(t testing.TB, list []packEntry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := range list {
		h := list[i].h
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(list[i].body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func expand(t testing.TB, c Compression, blob []byte) []byte {
	t.Helper()
	var r io.Reader
	if c == Zstd || c == ZstdChunked {
		d, err := zstd.NewReader(bytes.NewReader(blob))
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		r = d
	} else {
		var err error
		if r, err = gzip.NewReader(bytes.NewReader(blob)); err != nil { // not the library that wrote it
			t.Fatal(err)
		}
	}
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestPackRoundTrip decompresses each form with another program or library, and
// compares the tar with archive/tar's, to the byte.
func TestPackRoundTrip(t *testing.T) {
	list := sample()
	want := plainTar(t, list)
	for _, c := range compressions {
		t.Run(string(c), func(t *testing.T) {
			var blob bytes.Buffer
			got := packAll(t, &blob, list, PackOptions{Compression: c, Workers: 2})
			plain := expand(t, c, blob.Bytes())
			if c == EStargz { // has its landmark before, and its table after
				if !bytes.HasPrefix(plain[2*512:], want[:len(want)-1024]) {
					t.Error("the tar is not within the blob's")
				}
			} else if !bytes.Equal(plain, want) {
				t.Errorf("tar of %d bytes differs from the %d expected", len(plain), len(want))
			}
			if d := cmp.Diff(&Packed{
				Digest: digest.FromBytes(blob.Bytes()), DiffID: digest.FromBytes(plain),
				Size: int64(blob.Len()), Uncompressed: int64(len(plain)), Compression: c, Annotations: got.Annotations,
			}, got); d != "" {
				t.Error(d)
			}
			for _, workers := range []int{1, 7} {
				var again bytes.Buffer
				if d := cmp.Diff(got, packAll(t, &again, list, PackOptions{Compression: c, Workers: workers})); d != "" {
					t.Errorf("%d workers: %s", workers, d)
				}
				if !bytes.Equal(again.Bytes(), blob.Bytes()) {
					t.Errorf("%d workers: other bytes", workers)
				}
			}
			program := "gzip"
			if c == Zstd || c == ZstdChunked {
				program = "zstd"
			}
			if _, err := exec.LookPath(program); err != nil {
				t.Logf("%s is not installed", program)
				return
			}
			cmd := exec.CommandContext(t.Context(), program, "-dc")
			cmd.Stdin = &blob
			out, err := cmd.Output()
			if err != nil || !bytes.Equal(out, plain) {
				t.Errorf("%s -dc: %v, %d bytes", program, err, len(out))
			}
		})
	}
}

// TestPackGolden notices when the bytes change that a layer is packed to. A
// new release of the compressor may do that, or of archive/tar: then set the
// digests anew, and say in the changelog that commits of one upper by the two
// versions have two digests. A change for any other reason is a mistake.
func TestPackGolden(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	list := []packEntry{
		{h: tar.Header{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o755, ModTime: time.Unix(1700000000, 0)}},
		regular("d/a", words(r, 200)), regular("d/b", words(r, 100<<10)), regular("d/c", words(r, 5*mib)),
	}
	want := map[Compression]string{
		EStargz:     "sha256:62a8ca34c2f0778cc9f2d7f12709a1a84d4c50b16270942a75fa9543f7faf8ce",
		Gzip:        "sha256:79f8aa845c5af5e9dc84b01c5f415a6c3558ebd3b20079619745d8ec87ba1a30",
		Zstd:        "sha256:eccb4b6fbb19b423c33716a354adc3863da62ccdf970203a4e41e6f8df3162be",
		ZstdChunked: "sha256:2df45ee6972e960fca256425a93df7f341e0fad33e6961536a38764aa3a541f7",
	}
	for _, c := range compressions {
		got := packAll(t, io.Discard, list, PackOptions{Compression: c})
		if got.Digest != digest.Digest(want[c]) {
			t.Errorf("%s: %s, want %s", c, got.Digest, want[c])
		}
	}
}

func TestPackEmpty(t *testing.T) {
	for _, c := range compressions {
		var blob bytes.Buffer
		packAll(t, &blob, nil, PackOptions{Compression: c})
		tr := tar.NewReader(bytes.NewReader(expand(t, c, blob.Bytes())))
		for {
			h, err := tr.Next()
			if err == io.EOF {
				break
			}
			if err != nil || c != EStargz {
				t.Fatalf("%s: %v, %v", c, h, err)
			}
		}
	}
}

// joined runs f and fails if it leaves goroutines.
func joined(t *testing.T, f func()) {
	t.Helper()
	before := runtime.NumGoroutine()
	f()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if runtime.NumGoroutine() <= before {
			return
		}
	}
	buf := make([]byte, 64<<10)
	t.Errorf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
}

func TestPackBadContent(t *testing.T) {
	broken := errors.New("disk is broken")
	r := rand.New(rand.NewPCG(3, 4))
	big := words(r, 20*mib)
	for _, tt := range []struct {
		name string
		size int
		r    io.Reader
		want error
	}{
		{"shorter", 20 * mib, bytes.NewReader(big[:20*mib-1]), ErrChanged},
		{"none", 1, nil, ErrChanged},
		{"longer", 10, bytes.NewReader(big), ErrChanged},
		{"longer than nothing", 0, bytes.NewReader(big), ErrChanged},
		{"fails", 20 * mib, io.MultiReader(bytes.NewReader(big[:7*mib]), iotest.ErrReader(broken)), broken},
	} {
		for _, c := range compressions {
			t.Run(tt.name+" "+string(c), func(t *testing.T) {
				joined(t, func() {
					p := NewPacker(io.Discard, PackOptions{Compression: c, Workers: 2})
					err := p.Add(t.Context(), &tar.Header{Typeflag: tar.TypeReg, Name: "usr/f", Size: int64(tt.size)}, tt.r)
					if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), "usr/f") {
						t.Errorf("Add: %v", err)
					}
					if err := p.Add(t.Context(), &tar.Header{Typeflag: tar.TypeReg, Name: "g"}, nil); !errors.Is(err, tt.want) {
						t.Errorf("Add after failure: %v", err)
					}
					if _, err := p.Close(); !errors.Is(err, tt.want) {
						t.Errorf("Close: %v", err)
					}
				})
			})
		}
	}
}

// fullDisk takes so many bytes.
type fullDisk int

var errFull = errors.New("no space left on device")

func (d *fullDisk) Write(p []byte) (int, error) {
	n := min(len(p), int(*d))
	*d -= fullDisk(n)
	if n < len(p) {
		return n, errFull
	}
	return n, nil
}

func TestPackFullDisk(t *testing.T) {
	body := noise(rand.New(rand.NewPCG(5, 6)), 8*mib)
	for _, c := range compressions {
		for _, room := range []fullDisk{0, 1000, 5 * mib} {
			joined(t, func() {
				disk := room
				p := NewPacker(&disk, PackOptions{Compression: c, Workers: 3})
				var err error
				for i := 0; i < 40 && err == nil; i++ {
					err = p.Add(t.Context(), &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint(i), Size: int64(len(body))}, bytes.NewReader(body))
				}
				if !errors.Is(err, errFull) { // not only when all has been read
					t.Errorf("%s, room for %d: Add: %v", c, room, err)
				}
				if _, err := p.Close(); !errors.Is(err, errFull) {
					t.Errorf("%s, room for %d: Close: %v", c, room, err)
				}
			})
		}
		// Also where only what Close writes has no room.
		var blob bytes.Buffer
		packAll(t, &blob, sample()[:3], PackOptions{Compression: c})
		joined(t, func() {
			disk := fullDisk(blob.Len() - 1)
			p := NewPacker(&disk, PackOptions{Compression: c})
			if _, err := p.Close(); err != nil {
				t.Errorf("%s: an empty layer: %v", c, err)
			}
			disk = fullDisk(3)
			p = NewPacker(&disk, PackOptions{Compression: c})
			if _, err := p.Close(); !errors.Is(err, errFull) {
				t.Errorf("%s: Close: %v", c, err)
			}
		})
	}
}

// gate holds every write until it opens.
type gate chan struct{}

func (g gate) Write(p []byte) (int, error) { <-g; return len(p), nil }

func TestPackCancel(t *testing.T) {
	body := noise(rand.New(rand.NewPCG(5, 6)), mib)
	for _, c := range compressions {
		joined(t, func() {
			ctx, cancel := context.WithCancel(t.Context())
			g := make(gate)
			p := NewPacker(g, PackOptions{Compression: c, Workers: 2})
			added := make(chan error, 1)
			n := 0
			go func() {
				for {
					if err := p.Add(ctx, &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint(n), Size: int64(len(body))}, bytes.NewReader(body)); err != nil {
						added <- err
						return
					}
					n++
				}
			}()
			time.Sleep(20 * time.Millisecond) // until nothing more fits, most likely
			cancel()
			if err := <-added; !errors.Is(err, context.Canceled) {
				t.Errorf("%s: Add: %v", c, err)
			}
			if most := 2*inFlight(2) + 2; n > most {
				t.Errorf("%s: took %d MiB without writing one", c, n)
			}
			close(g)
			if _, err := p.Close(); !errors.Is(err, context.Canceled) {
				t.Errorf("%s: Close: %v", c, err)
			}
		})
	}
}

func TestPackRefuses(t *testing.T) {
	for _, tt := range []struct {
		c    Compression
		h    tar.Header
		want string
	}{
		{EStargz, tar.Header{Typeflag: tar.TypeReg, Name: "./stargz.index.json"}, "eStargz's own"},
		{EStargz, tar.Header{Typeflag: tar.TypeReg, Name: ".no.prefetch.landmark"}, "eStargz's own"},
		{EStargz, tar.Header{Typeflag: tar.TypeReg, Name: "a\xff"}, "not UTF-8"},
		{ZstdChunked, tar.Header{Typeflag: tar.TypeSymlink, Name: "a", Linkname: "\xff"}, "not UTF-8"},
		{ZstdChunked, tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "a"}, "type 'g'"},
		{Gzip, tar.Header{Typeflag: tar.TypeReg, Name: "a", Size: -1}, "size"},
		{Gzip, tar.Header{Typeflag: tar.TypeDir, Name: "a/", Size: 1}, "size"},
		{"lzma", tar.Header{Typeflag: tar.TypeReg, Name: "a"}, "choose one of estargz, gzip, zstd, zstd:chunked"},
	} {
		p := NewPacker(io.Discard, PackOptions{Compression: tt.c})
		if err := p.Add(t.Context(), &tt.h, nil); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s %+q: %v", tt.c, tt.h.Name, err)
		}
		if _, err := p.Close(); err == nil {
			t.Errorf("%s %+q: Close gave no error", tt.c, tt.h.Name)
		}
		if _, err := p.Close(); err == nil {
			t.Errorf("%s %+q: second Close gave no error", tt.c, tt.h.Name)
		}
	}
	p := NewPacker(io.Discard, PackOptions{})
	if _, err := p.Close(); err != nil {
		t.Error(err)
	}
	if err := p.Add(t.Context(), &tar.Header{Name: "a"}, nil); err == nil {
		t.Error("Add after Close gave no error")
	}
	for _, name := range []string{"a\xff", "stargz.index.json"} { // a tar holds any name
		packAll(t, io.Discard, []packEntry{regular(name, nil)}, PackOptions{Compression: Gzip})
	}
}

func TestMediaType(t *testing.T) {
	for _, tt := range []struct {
		c           Compression
		oci, docker string
	}{
		{"", "application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.docker.image.rootfs.diff.tar.gzip"},
		{EStargz, "application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.docker.image.rootfs.diff.tar.gzip"},
		{Gzip, "application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.docker.image.rootfs.diff.tar.gzip"},
		{Zstd, "application/vnd.oci.image.layer.v1.tar+zstd", ""},
		{ZstdChunked, "application/vnd.oci.image.layer.v1.tar+zstd", ""},
		{"xz", "", ""},
	} {
		oci, err := tt.c.MediaType(false)
		if oci != tt.oci || (err == nil) != (tt.oci != "") {
			t.Errorf("%q: %q, %v", tt.c, oci, err)
		}
		docker, err := tt.c.MediaType(true)
		if docker != tt.docker || (err == nil) != (tt.docker != "") {
			t.Errorf("%q, docker: %q, %v", tt.c, docker, err)
		}
	}
}

func BenchmarkPack(b *testing.B) {
	list := sample()
	var size int64
	for i := range list {
		size += list[i].h.Size
	}
	for _, c := range compressions {
		b.Run(string(c), func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				packAll(b, io.Discard, list, PackOptions{Compression: c})
			}
		})
	}
}
