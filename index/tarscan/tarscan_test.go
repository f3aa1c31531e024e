package tarscan

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/indextest"
)

func TestScan(t *testing.T) {
	tarball := indextest.Tar(t, tar.FormatPAX, members())
	garbage := append(slices.Clone(tarball), bytes.Repeat([]byte("after the end"), 1000)...)
	for name, tc := range map[string]struct {
		blob, tarball []byte
		c             Compression
	}{
		"plain":           {tarball, tarball, Plain},
		"plain, garbage":  {garbage, garbage, Plain},
		"plain, no end":   {tarball[:len(tarball)-1024], tarball[:len(tarball)-1024], Plain},
		"gzip":            {gz(t, tarball, 6, 1<<30), tarball, Gzip},
		"gzip, members":   {gz(t, tarball, 1, 65280), tarball, Gzip},
		"gzip, stored":    {gz(t, tarball, gzip.NoCompression, 1<<30), tarball, Gzip},
		"gzip, padding":   {append(gz(t, tarball, 1, 1<<30), make([]byte, 300_001)...), tarball, Gzip},
		"gzip, garbage":   {gz(t, garbage, 1, 1<<20), garbage, Gzip},
		"gzip, empty end": {append(gz(t, tarball, 1, 1<<30), gz(t, nil, 1, 1)...), tarball, Gzip},
		"zstd":            {zst(t, tarball, 1<<30), tarball, Zstd},
		"zstd, frames":    {zst(t, tarball, 100_000), tarball, Zstd},
		"zstd, garbage":   {zst(t, garbage, 1<<20), garbage, Zstd},
	} {
		t.Run(name, func(t *testing.T) { check(t, tc.blob, tc.tarball, tc.c) })
	}
}

func TestEntries(t *testing.T) {
	l := check(t, indextest.Tar(t, tar.FormatPAX, members()), indextest.Tar(t, tar.FormatPAX, members()), Plain)
	byName := map[string]index.Entry{}
	for _, e := range l.Entries {
		e.Data = 0
		byName[e.Name] = e
	}
	want := map[string]index.Entry{
		"a/su": {Name: "a/su", Mode: unix.S_IFREG | 0o4755, UID: 4000000000, GID: 7, Mtime: -3, MtimeNs: 250_000_000, Size: 5, Xattrs: []index.Xattr{
			{Name: "security.capability", Value: []byte("\x01\x00\x00\x02\xff\x00")}, {Name: "user.x y", Value: []byte("\x00\xff")}}},
		"link":       {Name: "link", Mode: unix.S_IFLNK | 0o777, Link: "../a/su"},
		"hard":       {Name: "hard", HardLink: true, Link: "a/su"},
		"null":       {Name: "null", Mode: unix.S_IFCHR | 0o666, Rdev: 300&0xff | 1<<8 | 0x100<<12},
		"disk":       {Name: "disk", Mode: unix.S_IFBLK | 0o660, Rdev: 1 | 300<<8},
		"pipe":       {Name: "pipe", Mode: unix.S_IFIFO | 0o600},
		"a/.wh.gone": {Name: "a/.wh.gone", Mode: unix.S_IFREG | 0o600},
	}
	for name, w := range want {
		if d := cmp.Diff(w, byName[name]); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
	// Of holed only the first and the last piece hold anything, of zeros none.
	for _, e := range l.Entries {
		from, to := l.Frames.PiecesIn(e.Data, max(e.Size, 1))
		if n := to - from; e.Name == "zeros" && n != 0 || e.Name == "holed" && n < 2 {
			t.Errorf("%s: %d pieces", e.Name, n)
		}
	}
}

func TestFormats(t *testing.T) {
	long := strings.Repeat("d/", 150) + strings.Repeat("n", 200)
	when := time.Unix(1700000000, 0)
	for name, f := range map[string]tar.Format{"gnu": tar.FormatGNU, "pax": tar.FormatPAX} {
		t.Run(name, func(t *testing.T) {
			ms := []indextest.Member{
				{H: tar.Header{Name: long, Mode: 0o644, ModTime: when, Uid: 1 << 31, Gid: 1<<32 - 1}, Data: []byte("x")},
				{H: tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: long, ModTime: time.Unix(-1e9, 0)}},
			}
			if f == tar.FormatPAX {
				ms = append(ms, indextest.Member{H: tar.Header{Name: "file", ModTime: when}, Data: []byte("y")})
			}
			p := indextest.Tar(t, f, ms)
			if f == tar.FormatPAX {
				var g bytes.Buffer
				tw := tar.NewWriter(&g)
				if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "g", PAXRecords: map[string]string{"comment": "hash"}}); err != nil {
					t.Fatal(err)
				}
				if err := tw.Flush(); err != nil {
					t.Fatal(err)
				}
				p = append(g.Bytes(), p...)
			}
			check(t, p, p, Plain)
		})
	}
}

func TestEmpty(t *testing.T) {
	var zip bytes.Buffer
	if err := gzip.NewWriter(&zip).Close(); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		blob, tarball []byte
		c             Compression
	}{
		"nothing":         {nil, nil, Plain},
		"end blocks":      {make([]byte, 1024), make([]byte, 1024), Plain},
		"zeroes":          {make([]byte, 10240), make([]byte, 10240), Plain},
		"gzip of nothing": {zip.Bytes(), nil, Gzip},
		"gzip of zeroes":  {gz(t, make([]byte, 1024), 9, 1024), make([]byte, 1024), Gzip},
		"zstd of zeroes":  {zst(t, make([]byte, 1024), 1024), make([]byte, 1024), Zstd},
	} {
		t.Run(name, func(t *testing.T) {
			if l := check(t, tc.blob, tc.tarball, tc.c); len(l.Entries) != 0 {
				t.Error(l.Entries)
			}
		})
	}
	if _, _, err := Scan(context.Background(), bytes.NewReader(nil), Gzip, &memory{}, Options{}); !errors.Is(err, index.ErrMalformed) {
		t.Errorf("gzip of nothing: %v", err)
	}
}

func TestDetect(t *testing.T) {
	for in, want := range map[string]Compression{
		"": Plain, "\x1f\x8b": Plain, "\x1f\x8b\x08": Gzip, "\x28\xb5\x2f\xfd": Zstd, "\x28\xb5\x2f": Plain,
		"\x50\x2a\x4d\x18": Zstd, "\x5f\x2a\x4d\x18": Zstd, "\x4f\x2a\x4d\x18": Plain, "./\x00\x00": Plain,
	} {
		if got := Detect([]byte(in)); got != want {
			t.Errorf("Detect(%q) = %v", in, got)
		}
	}
}

func TestRefuses(t *testing.T) {
	tarball := indextest.Tar(t, tar.FormatPAX, members())
	zipped, zstded := gz(t, tarball, 1, 1<<30), zst(t, tarball, 1<<30)
	one := func(h tar.Header) []byte {
		p := indextest.Tar(t, tar.FormatPAX, []indextest.Member{{H: h}})
		return p
	}
	typed := func(flag byte) []byte { // a header with a type the writer would not write
		p := indextest.Tar(t, tar.FormatUSTAR, []indextest.Member{{H: tar.Header{Name: "odd"}}})
		p[156] = flag
		sum := 0
		copy(p[148:], "        ")
		for _, c := range p[:512] {
			sum += int(c)
		}
		copy(p[148:], fmt.Sprintf("%06o\x00 ", sum))
		return p
	}
	sparse := func(size int64) []byte { // one hole and nothing else
		rec := " GNU.sparse.major=0\n22 GNU.sparse.minor=1\n26 GNU.sparse.numblocks=1\n"
		return append(paxHeader(t, "22"+rec, size), typed(tar.TypeReg)...)
	}
	for name, tc := range map[string]struct {
		blob []byte
		c    Compression
		want string
	}{
		"no tar":           {indextest.Noise(2000, 1), Plain, "not a tar archive: first bytes"},
		"gzip of no tar":   {gz(t, indextest.Noise(2000, 1), 1, 1<<20), Gzip, "not a tar archive: first bytes"},
		"json":             {[]byte(`{"a":1}`), Plain, "truncated"},
		"plain, cut":       {tarball[:5<<20], Plain, "truncated"},
		"plain, in header": {tarball[:1024+200], Plain, "truncated"},
		"gzip, cut":        {zipped[:len(zipped)/2], Gzip, "gzip is truncated"},
		"gzip, cut sum":    {zipped[:len(zipped)-3], Gzip, "gzip is truncated"},
		"gzip, cut head":   {zipped[:7], Gzip, "gzip is truncated"},
		"gzip of cut":      {gz(t, tarball[:5<<20], 1, 1<<30), Gzip, "truncated"},
		"gzip, sum":        {append(slices.Clone(zipped[:len(zipped)-8]), 1, 2, 3, 4, 5, 6, 7, 8), Gzip, "does not match its sum"},
		"gzip, trailing":   {append(slices.Clone(zipped), "more"...), Gzip, "no gzip member"},
		"gzip, padded":     {append(slices.Clone(zipped), 0, 0, 0, 1), Gzip, "zero padding"},
		"no gzip":          {tarball, Gzip, "gzip"},
		"no zstd":          {tarball, Zstd, "zstd"},
		"zstd, cut":        {zstded[:len(zstded)/2], Zstd, "zstd is truncated"},
		"zstd, trailing":   {append(slices.Clone(zstded), "more data"...), Zstd, "zstd"},
		"zstd, window":     {[]byte("\x28\xb5\x2f\xfd\x00\xa8\x09\x00\x00{"), Zstd, "window"},
		"volume":           {typed('V'), Plain, `"odd": unhandled tar header type 86`},
		"dump":             {typed('D'), Plain, "unhandled tar header type"},
		"climbs":           {one(tar.Header{Name: "a/../../b"}), Plain, "climbs"},
		"sparse":           {sparse(1<<40 + 1), Plain, "sparse files"},
		"hard link":        {one(tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "../x"}), Plain, "climbs"},
		"uid":              {one(tar.Header{Name: "u", Uid: 1 << 32}), Plain, "32 bits"},
		"gid":              {one(tar.Header{Name: "u", Gid: 1 << 40}), Plain, "32 bits"},
		"device":           {one(tar.Header{Name: "d", Typeflag: tar.TypeChar, Devminor: 1 << 20}), Plain, "device number"},
		"xattr":            {one(tar.Header{Name: "x", PAXRecords: map[string]string{"SCHILY.xattr.user.a": strings.Repeat("x", 70_000)}}), Plain, "attribute"},
		"libarchive":       {one(tar.Header{Name: "x", PAXRecords: map[string]string{"LIBARCHIVE.xattr.user.a": "%"}}), Plain, "PAX record"},
	} {
		t.Run(name, func(t *testing.T) {
			before := runtime.NumGoroutine()
			_, _, err := Scan(context.Background(), bytes.NewReader(tc.blob), tc.c, &memory{}, Options{})
			if !errors.Is(err, index.ErrMalformed) || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want %q", err, tc.want)
			}
			leaks(t, before)
		})
	}
}

// paxHeader makes the extended header of a sparse file of the form 0.1 with one
// empty run of data at its end.
func paxHeader(t *testing.T, records string, size int64) []byte {
	t.Helper()
	for _, r := range []string{fmt.Sprintf("GNU.sparse.size=%d\n", size), fmt.Sprintf("GNU.sparse.map=%d,0\n", size)} {
		n := len(r) + 1
		n += len(strconv.Itoa(n + 2))
		records += fmt.Sprintf("%d %s", n, r)
	}
	p := indextest.Tar(t, tar.FormatUSTAR, []indextest.Member{{H: tar.Header{Name: "pax"}, Data: []byte(records)}})
	p[156] = tar.TypeXHeader
	sum := 0
	copy(p[148:], "        ")
	for _, c := range p[:512] {
		sum += int(c)
	}
	copy(p[148:], fmt.Sprintf("%06o\x00 ", sum))
	return p[:1024]
}

func leaks(t *testing.T, before int) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if runtime.NumGoroutine() <= before {
			return
		}
	}
	t.Errorf("%d goroutines, before %d", runtime.NumGoroutine(), before)
}

func TestOthersFail(t *testing.T) {
	tarball := indextest.Tar(t, tar.FormatPAX, members())
	gone, full := errors.New("gone"), errors.New("disk full")
	for c, blob := range map[Compression][]byte{Plain: tarball, Gzip: gz(t, tarball, 1, 1<<30), Zstd: zst(t, tarball, 1<<20)} {
		before := runtime.NumGoroutine()
		for _, at := range []int{0, 300, len(blob) / 2, len(blob)} {
			r := io.MultiReader(bytes.NewReader(blob[:at]), iotest.ErrReader(gone))
			if _, _, err := Scan(context.Background(), r, c, &memory{}, Options{}); !errors.Is(err, gone) || errors.Is(err, index.ErrMalformed) {
				t.Errorf("%v: reader fails at %d: %v", c, at, err)
			}
		}
		if _, _, err := Scan(context.Background(), bytes.NewReader(blob), c, &memory{err: full}, Options{}); !errors.Is(err, full) || errors.Is(err, index.ErrMalformed) {
			t.Errorf("%v: sink fails: %v", c, err)
		}
		if _, _, err := Scan(context.Background(), iotest.HalfReader(iotest.DataErrReader(bytes.NewReader(blob))), c, &memory{}, Options{}); err != nil {
			t.Error(err)
		}
		leaks(t, before)
	}
}

// TestGNUSparse reads the sparse forms that GNU tar writes.
func TestGNUSparse(t *testing.T) {
	gnu, err := exec.LookPath("tar")
	if err != nil {
		t.Skip("no tar to write sparse files with")
	}
	if out, err := exec.Command(gnu, "--version").Output(); err != nil || !bytes.Contains(out, []byte("GNU tar")) {
		t.Skip("tar is not GNU tar, which alone writes these forms")
	}
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(30) { // more runs than the old form has room for in a header
		if _, err := f.WriteAt(indextest.Noise(5000, uint64(i)), i*600_000); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(f.Truncate(40<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "after"), indextest.Noise(5000, 99), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"gnu": {"--format=gnu"}, "0.0": {"--format=pax", "--sparse-version=0.0"},
		"0.1": {"--format=pax", "--sparse-version=0.1"}, "1.0": {"--format=pax", "--sparse-version=1.0"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, name+".tar")
			cmd := exec.Command(gnu, append(args, "-S", "-C", dir, "-cf", path, "sparse", "after")...)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			p := readFile(t, path)
			if len(p) > 1<<20 {
				t.Skip("the filesystem has no holes")
			}
			for _, l := range []*index.Layer{check(t, p, p, Plain), check(t, gz(t, p, 1, 1<<30), p, Gzip)} {
				if len(l.Entries) != 2 || l.Entries[0].Name != "sparse" || l.Entries[0].Size != 40<<20 {
					t.Errorf("%+v", l.Entries)
				}
			}
		})
	}
}

func TestPigz(t *testing.T) {
	pigz, err := exec.LookPath("pigz")
	if err != nil {
		t.Skip("no pigz: scripts/deps installs it")
	}
	tarball := indextest.Tar(t, tar.FormatPAX, members())
	for _, args := range [][]string{{"-c"}, {"-c", "-i", "-0"}, {"-c", "-p", "4", "-b", "128"}} {
		cmd := exec.Command(pigz, args...)
		cmd.Stdin = bytes.NewReader(tarball)
		blob, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		check(t, blob, tarball, Gzip)
	}
}

func FuzzScan(f *testing.F) {
	small := indextest.Tar(f, tar.FormatPAX, append(members()[:3], members()[8:]...))
	f.Add(small, uint8(Plain))
	f.Add(small, uint8(Gzip)|0x80)
	f.Add(small, uint8(Zstd)|0x80)
	f.Add(gz(f, small, 6, 1000), uint8(Gzip))
	f.Add(append(gz(f, small, 0, 1<<20), 0, 0, 0), uint8(Gzip))
	f.Add(zst(f, small, 1000), uint8(Zstd))
	f.Add(indextest.Tar(f, tar.FormatGNU, []indextest.Member{{H: tar.Header{Name: strings.Repeat("n/", 200) + "f", Mode: 0o644}, Data: []byte("x")}}), uint8(Plain))
	f.Fuzz(func(t *testing.T, data []byte, how uint8) {
		c := Compression(how & 0x7f)
		if c > Zstd {
			return
		}
		if how&0x80 != 0 && c == Gzip {
			data = gz(t, data, 1, 1<<20)
		} else if how&0x80 != 0 && c == Zstd {
			data = zst(t, data, 1<<20)
		}
		// A sparse file can be of terabytes, which would only be slow.
		sink := &discard{}
		l, res, err := Scan(context.Background(), bytes.NewReader(data), c, sink, Options{})
		if err != nil {
			if !errors.Is(err, index.ErrMalformed) && !errors.Is(err, errLate) {
				t.Error(err)
			}
			return
		}
		if err := l.Frames.Verify(); err != nil || res.Size != int64(len(data)) {
			t.Error(err, res)
		}
	})
}

var errLate = errors.New("too far into the data file")

type discard struct{}

func (discard) WriteAt(p []byte, off int64) (int, error) {
	if off > 1<<30 {
		return 0, errLate
	}
	return len(p), nil
}

func BenchmarkScan(b *testing.B) {
	tarball := indextest.Tar(b, tar.FormatPAX, members())
	for name, blob := range map[string][]byte{"plain": tarball, "gzip": gz(b, tarball, 6, 1<<30), "zstd": zst(b, tarball, 1<<30)} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(tarball)))
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := Scan(context.Background(), bytes.NewReader(blob), Detect(blob), discard{}, Options{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// A small blob can decompress to zeroes without end, which nobody who gives up
// waits for.
func TestBomb(t *testing.T) {
	small := indextest.Tar(t, tar.FormatPAX, members()[:3])
	blob := gz(t, append(slices.Clone(small), make([]byte, maxTrailing+1<<20)...), 1, 1<<30)
	if _, _, err := Scan(context.Background(), bytes.NewReader(blob), Gzip, &memory{}, Options{}); !errors.Is(err, index.ErrMalformed) || !strings.Contains(err.Error(), "follow the end") {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, _, err := Scan(ctx, bytes.NewReader(blob), Gzip, &memory{}, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}
