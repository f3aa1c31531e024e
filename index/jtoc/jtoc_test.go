package jtoc

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/index"
)

const dataEnd = 10_000

var (
	sumA = digest.FromString("a").String()
	sumB = digest.FromString("b").String()
)

func parse(doc string, o Options) (*index.Layer, error) {
	b := index.NewBuilder(index.Zstd)
	if o.DataEnd == 0 {
		o.DataEnd = dataEnd
	}
	if err := Read(strings.NewReader(doc), digest.FromString(doc), b, o); err != nil {
		return nil, err
	}
	return b.Layer(o.DataEnd)
}

// toc makes a document of entries, with A and B for two digests.
func toc(entries ...string) string {
	doc := `{"version":1,"entries":[` + strings.Join(entries, ",") + `]}`
	return strings.NewReplacer("'A'", `"`+sumA+`"`, "'B'", `"`+sumB+`"`).Replace(doc)
}

func TestEntries(t *testing.T) {
	l, err := parse(`{"tarSplitDigest":"x","more":{"a":[1,{}]},`+strings.TrimPrefix(toc(
		`{"type":"dir","name":"./","mode":493,"modtime":"0001-01-01T00:00:00Z"}`,
		`{"type":"reg","name":"/a//b","mode":35309,"size":0,"uid":4294967295,"gid":1,"modtime":"1969-12-31T23:59:58.25Z"}`,
		`{"type":"symlink","name":"s","linkName":"../..//x","mode":511}`,
		`{"type":"hardlink","name":"h","linkName":"./a/b","mode":420}`,
		`{"type":"char","name":"c","devMajor":5,"devMinor":300}`,
		`{"type":"block","name":"k","devMajor":300,"devMinor":5,"userName":"root"}`,
		`{"type":"fifo","name":"f","modtime":"2020-01-02T03:04:05.5+01:00"}`,
		`{"type":"reg","name":"x","xattrs":{"user.z":"AP8=","user.a":""}}`,
		`{"type":"reg","name":"y"}`), "{"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	want := []index.Entry{
		{Name: "", Mode: unix.S_IFDIR | 0o755},
		{Name: "a/b", Mode: unix.S_IFREG | 0o4755, UID: 1<<32 - 1, GID: 1, Mtime: -2, MtimeNs: 250_000_000},
		{Name: "s", Mode: unix.S_IFLNK | 0o777, Link: "../..//x"},
		{Name: "h", HardLink: true, Link: "a/b"},
		{Name: "c", Mode: unix.S_IFCHR, Rdev: 300&0xff | 5<<8 | 0x100<<12},
		{Name: "k", Mode: unix.S_IFBLK, Rdev: 5 | 300<<8},
		{Name: "f", Mode: unix.S_IFIFO, Mtime: 1577930645, MtimeNs: 500_000_000},
		{Name: "x", Mode: unix.S_IFREG, Xattrs: []index.Xattr{{Name: "user.a", Value: []byte{}}, {Name: "user.z", Value: []byte{0, 255}}}},
		{Name: "y", Mode: unix.S_IFREG},
	}
	if d := cmp.Diff(want, l.Entries); d != "" {
		t.Error(d)
	}
}

func TestChunks(t *testing.T) {
	l, err := parse(toc(
		`{"type":"reg","name":"two","size":30,"offset":100,"endOffset":190,"chunkSize":10,"chunkDigest":'A'}`,
		`{"type":"chunk","name":"two","offset":120,"chunkOffset":10,"chunkSize":15,"chunkType":"zeros","chunkDigest":'A'}`,
		`{"type":"chunk","name":"two","offset":150,"chunkOffset":25,"chunkDigest":'B'}`,
		`{"type":"reg","name":"one","size":7,"offset":200,"digest":'B'}`,
		`{"type":"reg","name":"inner","size":9,"offset":200,"innerOffset":512,"chunkSize":4,"digest":'A',"chunkDigest":'A'}`,
		`{"type":"chunk","name":"inner","offset":300,"chunkOffset":4,"chunkDigest":'B'}`,
		`{"type":"reg","name":"hole","size":5000,"chunkSize":5000,"chunkType":"zeros"}`,
		`{"type":"reg","name":".skip","size":30,"offset":100,"chunkSize":10}`,
		`{"type":"chunk","name":".skip","offset":120,"chunkOffset":10,"chunkSize":15}`,
	), Options{Skip: func(name string, off int64) bool { return name == ".skip" && off == 100 }})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Frames.Verify(); err != nil {
		t.Fatal(err)
	}
	frames, pieces, _ := l.Frames.Len()
	var fs []index.Frame
	for i := range frames {
		fs = append(fs, l.Frames.Frame(i))
	}
	z := index.Zstd
	if d := cmp.Diff([]index.Frame{{Offset: 100, Length: 20, Kind: z}, {Offset: 150, Length: 40, Kind: z}, {Offset: 200, Length: 100, Kind: z}, {Offset: 300, Length: 9700, Kind: z}}, fs); d != "" {
		t.Error(d)
	}
	type short struct {
		File, Size, Inner int64
		Frame             int
		A                 bool
	}
	got := map[string][]short{}
	for _, e := range l.Entries {
		for i := range pieces {
			if p := l.Frames.Piece(i); e.Size > 0 && p.Data >= e.Data && p.Data < e.Data+e.Size {
				got[e.Name] = append(got[e.Name], short{p.Data - e.Data, p.Size, p.Inner, p.Frame, p.Digest == mustSum(t, sumA)})
			}
		}
	}
	want := map[string][]short{
		"two":   {{0, 10, 0, 0, true}, {25, 5, 0, 1, false}},
		"one":   {{0, 7, 0, 2, false}},
		"inner": {{0, 4, 512, 2, true}, {4, 5, 0, 3, false}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if len(l.Entries) != 4 {
		t.Errorf("%d entries", len(l.Entries))
	}
}

func mustSum(t *testing.T, s string) [32]byte {
	sum, err := parseDigest(s)
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

func TestRefuses(t *testing.T) {
	reg := func(rest string) string { return `{"type":"reg","name":"f","size":30,` + rest + `}` }
	for name, tc := range map[string]struct{ doc, want string }{
		"empty":            {``, "truncated"},
		"cut":              {`{"version":1,"entries":[{"type"`, "truncated"},
		"no json":          {`hello`, "TOC"},
		"array":            {`[]`, "want {"},
		"no version":       {`{"entries":[]}`, "version"},
		"version":          {`{"version":2,"entries":[]}`, "version 2"},
		"entries object":   {`{"version":1,"entries":{}}`, "begin with"},
		"entries twice":    {`{"version":1,"entries":[],"entries":[]}`, "twice"},
		"trailing":         {`{"version":1,"entries":[]} {}`, "after its end"},
		"trailing later":   {`{"version":1,"entries":[]}` + strings.Repeat(" ", 9000) + "x", "after its end"},
		"null entry":       {toc(`null`), "empty name"},
		"number":           {toc(`{"type":"reg","name":"f","size":1e99}`), "entry 0"},
		"type":             {toc(`{"type":"socket","name":"f"}`), `unknown type "socket"`},
		"climbs":           {toc(`{"type":"reg","name":"../f"}`), "climbs"},
		"link climbs":      {toc(`{"type":"hardlink","name":"f","linkName":"../../x"}`), "climbs"},
		"link to nothing":  {toc(`{"type":"hardlink","name":"f"}`), "empty name"},
		"no target":        {toc(`{"type":"symlink","name":"f"}`), "target"},
		"uid":              {toc(`{"type":"dir","name":"f","uid":4294967296}`), "owner"},
		"gid":              {toc(`{"type":"dir","name":"f","gid":-1}`), "owner"},
		"device":           {toc(`{"type":"char","name":"f","devMajor":4096}`), "device number"},
		"time":             {toc(`{"type":"dir","name":"f","modtime":"yesterday"}`), "time"},
		"base64":           {toc(`{"type":"dir","name":"f","xattrs":{"user.a":"%"}}`), "entry 0"},
		"xattr":            {toc(`{"type":"dir","name":"f","xattrs":{"":"AA=="}}`), "attribute"},
		"negative size":    {toc(`{"type":"reg","name":"f","size":-1}`), "size"},
		"huge size":        {toc(`{"type":"reg","name":"f","size":9223372036854775807}`), "size"},
		"no digest":        {toc(reg(`"offset":1`)), "no digest"},
		"chunk no digest":  {toc(reg(`"offset":1,"digest":'A',"chunkSize":10`), `{"type":"chunk","offset":2,"chunkOffset":10,"chunkDigest":'A'}`), "no digest"},
		"md5":              {toc(reg(`"offset":1,"digest":"md5:00"`)), "no sha256"},
		"hex":              {toc(reg(`"offset":1,"digest":"sha256:` + strings.Repeat("x", 64) + `"`)), "no sha256"},
		"orphan":           {toc(`{"type":"chunk","name":"f","offset":1,"chunkDigest":'A'}`), "no file"},
		"orphan of dir":    {toc(`{"type":"dir","name":"f"}`, `{"type":"chunk","name":"f","offset":1,"chunkDigest":'A'}`), "no file"},
		"orphan of empty":  {toc(`{"type":"reg","name":"f"}`, `{"type":"chunk","name":"f","offset":1,"chunkDigest":'A'}`), "no file"},
		"other's chunk":    {toc(reg(`"offset":1,"chunkSize":1,"chunkDigest":'A'`), `{"type":"chunk","name":"g","offset":1,"chunkOffset":1,"chunkDigest":'A'}`), "follows"},
		"gap":              {toc(reg(`"offset":1,"chunkSize":10,"chunkDigest":'A'`), `{"type":"chunk","name":"f","offset":2,"chunkOffset":11,"chunkDigest":'A'}`), "does not follow"},
		"overlap":          {toc(reg(`"offset":1,"chunkSize":10,"chunkDigest":'A'`), `{"type":"chunk","name":"f","offset":2,"chunkOffset":9,"chunkDigest":'A'}`), "does not follow"},
		"order":            {toc(reg(`"offset":1,"chunkOffset":10,"chunkDigest":'A'`), `{"type":"chunk","name":"f","offset":2,"chunkSize":10,"chunkDigest":'A'}`), "does not follow"},
		"short":            {toc(reg(`"offset":1,"chunkSize":10,"chunkDigest":'A'`)), "cover 10 of 30"},
		"past the file":    {toc(reg(`"offset":1,"chunkSize":31,"chunkDigest":'A'`)), "does not follow"},
		"after the file":   {toc(reg(`"offset":1,"digest":'A',"chunkDigest":'A'`), `{"type":"chunk","name":"f","offset":2,"chunkOffset":30,"chunkDigest":'A'}`), "does not follow"},
		"negative chunk":   {toc(reg(`"offset":1,"chunkSize":-5,"digest":'A'`)), "does not follow"},
		"negative at":      {toc(reg(`"offset":1,"chunkOffset":-5,"digest":'A'`)), "does not follow"},
		"past the blob":    {toc(reg(`"offset":10000,"digest":'A'`)), "data ends"},
		"negative offset":  {toc(reg(`"offset":-1,"digest":'A'`)), "data ends"},
		"end past":         {toc(reg(`"offset":1,"endOffset":10001,"digest":'A'`)), "data ends"},
		"end before":       {toc(reg(`"offset":100,"endOffset":100,"digest":'A'`)), "ends at"},
		"negative inner":   {toc(reg(`"offset":1,"innerOffset":-1,"digest":'A'`)), "data ends"},
		"chunks backwards": {toc(reg(`"offset":100,"endOffset":200,"chunkSize":10,"chunkDigest":'A'`), `{"type":"chunk","offset":90,"chunkOffset":10,"chunkDigest":'A'}`), "follows one"},
		"chunk type":       {toc(reg(`"offset":1,"digest":'A',"chunkType":"ones"`)), "unknown type"},
		"frames overlap":   {toc(reg(`"offset":100,"endOffset":300,"digest":'A'`), `{"type":"reg","name":"g","size":1,"offset":200,"endOffset":210,"digest":'B'}`), "past 200"},
		"long entry":       {toc(`{"type":"dir","name":"f","x":"` + strings.Repeat("y", 4<<20) + `"}`), "longer than"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parse(tc.doc, Options{})
			if !errors.Is(err, index.ErrMalformed) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			} else if strings.Contains(err.Error(), "\n") || len(err.Error()) > 600 {
				t.Errorf("not one short line: %v", err)
			}
		})
	}
}

func TestDigest(t *testing.T) {
	doc := toc() + "  \n"
	b := index.NewBuilder(index.Gzip)
	if err := Read(strings.NewReader(doc), digest.FromString(toc()), b, Options{}); !errors.Is(err, index.ErrMalformed) {
		t.Errorf("white space after the end is not hashed: %v", err)
	}
	if err := Read(strings.NewReader(doc), "", b, Options{}); !errors.Is(err, index.ErrMalformed) {
		t.Errorf("no digest wanted: %v", err)
	}
	if err := Read(strings.NewReader(doc), "", b, Options{Proved: true}); err != nil {
		t.Error(err)
	}
	if err := Read(strings.NewReader(doc), digest.FromString("x"), b, Options{Proved: true}); !errors.Is(err, index.ErrMalformed) {
		t.Errorf("digest is not compared: %v", err)
	}
	gone := errors.New("gone")
	r := io.MultiReader(strings.NewReader(doc[:5]), iotest.ErrReader(gone))
	if err := Read(r, digest.FromString(doc), b, Options{}); !errors.Is(err, gone) || errors.Is(err, index.ErrMalformed) {
		t.Errorf("a failing reader: %v", err)
	}
	if err := Read(iotest.OneByteReader(strings.NewReader(doc)), digest.FromString(doc), b, Options{}); err != nil {
		t.Error(err)
	}
}

// endless is a document that never ends.
type endless struct{ head *strings.Reader }

func (e endless) Read(p []byte) (int, error) {
	if n, _ := e.head.Read(p); n > 0 {
		return n, nil
	}
	return copy(p, bytes.Repeat([]byte(" "), len(p))), nil
}

func TestEndless(t *testing.T) {
	if testing.Short() {
		t.Skip("reads 256 MiB")
	}
	for _, head := range []string{toc(), `{"version":1,"entries":[`} {
		err := Read(endless{strings.NewReader(head)}, digest.FromString("x"), index.NewBuilder(index.Gzip), Options{})
		if !errors.Is(err, index.ErrMalformed) {
			t.Errorf("got %v", err)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add(toc(`{"type":"reg","name":"a","size":30,"offset":100,"endOffset":190,"chunkSize":10,"chunkDigest":'A',"mode":420}`,
		`{"type":"chunk","name":"a","offset":120,"chunkOffset":10,"chunkSize":15,"chunkType":"zeros","chunkDigest":'A'}`,
		`{"type":"chunk","name":"a","offset":150,"chunkOffset":25,"chunkDigest":'B'}`))
	f.Add(toc(`{"type":"char","name":"c","devMajor":5,"devMinor":300}`, `{"type":"hardlink","name":"h","linkName":"./a/b"}`,
		`{"type":"reg","name":"x","modtime":"1969-12-31T23:59:58.25Z","xattrs":{"user.z":"AP8=","user.a":""}}`))
	f.Fuzz(func(t *testing.T, doc string) {
		l, err := parse(doc, Options{Skip: func(name string, _ int64) bool { return name == ".skip" }})
		if err != nil {
			if !errors.Is(err, index.ErrMalformed) {
				t.Error(err)
			}
			return
		}
		if err := l.Frames.Verify(); err != nil {
			t.Error(err)
		}
		frames, _, _ := l.Frames.Len()
		for i := range frames {
			if f := l.Frames.Frame(i); f.Offset < 0 || f.Length <= 0 || f.Offset+f.Length > dataEnd {
				t.Errorf("frame %+v", f)
			}
		}
	})
}

func BenchmarkRead(b *testing.B) {
	var entries []string
	for i := range 10_000 {
		entries = append(entries, fmt.Sprintf(`{"name":"usr/share/doc/package/file%d","type":"reg","size":1000,"modtime":"2024-01-02T03:04:05Z","mode":420,"offset":%d,"digest":'A',"chunkDigest":'A'}`, i, 100+i*500))
	}
	doc := toc(entries...)
	b.SetBytes(int64(len(doc)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := parse(doc, Options{DataEnd: 1 << 30}); err != nil {
			b.Fatal(err)
		}
	}
}
