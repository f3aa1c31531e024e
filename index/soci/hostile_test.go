package soci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"runtime"
	"strings"
	"testing"

	flatbuffers "github.com/google/flatbuffers/go"

	"github.com/varvefs/varve/index"
)

// doc is a zTOC that need not make sense.
type doc struct {
	version         string
	blob, tar       int64
	files           []docFile
	algorithm       byte
	last            int32
	digests         []string
	have            int
	points          []index.Point
	span, tarinfo   int64 // of a plain tar
	noTOC, noInfo   bool
	sharedPAX       int // all files have this many records, in one list
	sharedName      string
	sharedDigests   int
	checkpointBytes int // taken off
}

type docFile struct {
	name, kind, link, time string
	off, size              int64
	major, minor           int64
	pax                    []string // keys and values
}

// sound is a zTOC that is read.
func sound() doc {
	d := strings.Repeat("ab", 32)
	return doc{
		version: "0.9", blob: 1000, tar: 4096, algorithm: algorithmGzip, last: 1, have: 2,
		digests: []string{"sha256:" + d, "sha256:" + d},
		points:  []index.Point{{In: 10}, {In: 500, Bits: 3, Out: 1000}},
		files: []docFile{
			{name: "a", kind: "reg", off: 512, size: 700},
			{name: "b", kind: "dir", off: 2048},
			{name: "c", kind: "symlink", off: 2560, link: "x"},
		},
	}
}

func (d doc) bytes() []byte {
	w := &writer{Builder: flatbuffers.NewBuilder(1024)}
	var pax flatbuffers.UOffsetT
	if d.sharedPAX > 0 {
		k, v := w.CreateString("SCHILY.xattr.user.x"), w.CreateString("v")
		w.StartObject(paxFields)
		w.PrependUOffsetTSlot(paxKey, k, 0)
		w.PrependUOffsetTSlot(paxValue, v, 0)
		r := w.EndObject()
		list := make([]flatbuffers.UOffsetT, d.sharedPAX)
		for i := range list {
			list[i] = r
		}
		pax = w.CreateVectorOfTables(list)
	}
	var files []flatbuffers.UOffsetT
	for _, f := range d.files {
		if f.time == "" {
			f.time = "2020-01-01T00:00:00Z"
		}
		name := w.CreateSharedString(f.name + d.sharedName)
		kind, link, when := w.CreateSharedString(f.kind), w.shared(f.link), w.CreateSharedString(f.time)
		p := pax
		if len(f.pax) > 0 {
			var list []flatbuffers.UOffsetT
			for i := 0; i < len(f.pax); i += 2 {
				k, v := w.CreateSharedString(f.pax[i]), w.CreateSharedString(f.pax[i+1])
				w.StartObject(paxFields)
				w.PrependUOffsetTSlot(paxKey, k, 0)
				w.PrependUOffsetTSlot(paxValue, v, 0)
				list = append(list, w.EndObject())
			}
			p = w.CreateVectorOfTables(list)
		}
		w.StartObject(fileFields)
		w.PrependInt64Slot(fileOffset, f.off, 0)
		w.PrependInt64Slot(fileSize, f.size, 0)
		w.PrependInt64Slot(fileDevmajor, f.major, 0)
		w.PrependInt64Slot(fileDevminor, f.minor, 0)
		w.PrependUOffsetTSlot(fileName, name, 0)
		w.PrependUOffsetTSlot(fileType, kind, 0)
		w.PrependUOffsetTSlot(fileLink, link, 0)
		w.PrependUOffsetTSlot(fileModTime, when, 0)
		w.PrependUOffsetTSlot(filePAX, p, 0)
		files = append(files, w.EndObject())
	}
	metadata := w.CreateVectorOfTables(files)
	w.StartObject(tocFields)
	w.PrependUOffsetTSlot(tocMetadata, metadata, 0)
	toc := w.EndObject()

	var sums []flatbuffers.UOffsetT
	for _, s := range d.digests {
		sums = append(sums, w.CreateString(s))
	}
	for range d.sharedDigests {
		sums = append(sums, sums[0])
	}
	list := w.CreateVectorOfTables(sums)
	var points []byte
	if d.algorithm == algorithmUncompressed {
		points = tarinfo(&Source{SpanSize: d.span, Compressed: d.tarinfo})
	} else {
		points = binary.LittleEndian.AppendUint32(nil, uint32(d.have))
		points = binary.LittleEndian.AppendUint64(points, 1000)
		for _, p := range d.points {
			points = binary.LittleEndian.AppendUint64(points, uint64(p.In))
			points = binary.LittleEndian.AppendUint64(points, uint64(p.Out))
			points = append(points, p.Bits)
			points = append(points, make([]byte, windowSize)...)
		}
		points = points[:len(points)-d.checkpointBytes]
	}
	checkpoints := w.CreateByteVector(points)
	w.StartObject(infoFields)
	w.PrependByteSlot(infoAlgorithm, d.algorithm, algorithmGzip)
	w.PrependInt32Slot(infoMaxSpan, d.last, 0)
	w.PrependUOffsetTSlot(infoDigests, list, 0)
	w.PrependUOffsetTSlot(infoCheckpoints, checkpoints, 0)
	info := w.EndObject()

	v := w.CreateString(d.version)
	if d.noTOC {
		toc = 0
	}
	if d.noInfo {
		info = 0
	}
	w.StartObject(ztocFields)
	w.PrependUOffsetTSlot(ztocVersion, v, 0)
	w.PrependInt64Slot(ztocCompressed, d.blob, 0)
	w.PrependInt64Slot(ztocUncompressed, d.tar, 0)
	w.PrependUOffsetTSlot(ztocTOC, toc, 0)
	w.PrependUOffsetTSlot(ztocInfo, info, 0)
	w.Finish(w.EndObject())
	return w.FinishedBytes()
}

func plainDoc(size, span int64, n int) doc {
	d := sound()
	d.algorithm, d.tarinfo, d.span, d.last = algorithmUncompressed, size, span, int32(n-1)
	d.blob, d.tar = size, size
	for len(d.digests) < n {
		d.digests = append(d.digests, d.digests[0])
	}
	return d
}

func TestSound(t *testing.T) {
	v1 := sound()
	v1.points = v1.points[1:]
	empty := sound()
	empty.noTOC = true
	twice := sound() // a block that holds nothing
	twice.points[1].Out = 0
	link := sound() // with the size of its target, as some tars have it
	link.files[1] = docFile{name: "b", kind: "hardlink", link: "a", off: 2048, size: 700}
	for name, d := range map[string]doc{
		"sound": sound(), "first layout": v1, "no entries": empty, "two points at one place": twice,
		"hard link with a size": link, "plain": plainDoc(4096, 2048, 2), "plain, short end": plainDoc(4096, 4000, 2),
	} {
		l, err := Read(d.bytes(), d.blob)
		if err == nil {
			err = covers(l)
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestHostile(t *testing.T) {
	for name, change := range map[string]func(d *doc){
		"version":                  func(d *doc) { d.version = "1.0" },
		"no compression info":      func(d *doc) { d.noInfo = true },
		"blob size":                func(d *doc) { d.blob++ },
		"negative tar":             func(d *doc) { d.tar = -1 },
		"huge tar":                 func(d *doc) { d.tar = index.MaxDataSize + 1 },
		"largest tar":              func(d *doc) { d.tar = math.MaxInt64 },
		"data past its limit":      func(d *doc) { d.tar, d.files[0].size, d.files = index.MaxDataSize, index.MaxDataSize-4000, d.files[:1] },
		"algorithm":                func(d *doc) { d.algorithm = 3 },
		"no digests":               func(d *doc) { d.digests, d.last = nil, -1 },
		"a digest too few":         func(d *doc) { d.digests = d.digests[1:] },
		"a digest too many":        func(d *doc) { d.digests = append(d.digests, d.digests[0]) },
		"last span":                func(d *doc) { d.last = 2 },
		"fewer points than spans":  func(d *doc) { d.have, d.points = 1, d.points[:1] },
		"more points than spans":   func(d *doc) { d.have, d.points = 3, append(d.points, index.Point{In: 600, Out: 2000}) },
		"wrong number of points":   func(d *doc) { d.have = 4 },
		"negative number":          func(d *doc) { d.have = -1 },
		"size of points":           func(d *doc) { d.checkpointBytes = 1 },
		"points cut short":         func(d *doc) { d.checkpointBytes = 2*checkpointSize + 1 },
		"another hash":             func(d *doc) { d.digests[0] = "sha512:" + strings.Repeat("ab", 64) },
		"short digest":             func(d *doc) { d.digests[1] = "sha256:abab" },
		"empty digest":             func(d *doc) { d.digests[1] = "" },
		"digest in capitals":       func(d *doc) { d.digests[1] = strings.ToUpper(d.digests[1][:7]) + d.digests[1][7:] },
		"hex in capitals":          func(d *doc) { d.digests[1] = "sha256:" + strings.Repeat("AB", 32) },
		"no hex":                   func(d *doc) { d.digests[1] = "sha256:" + strings.Repeat("xy", 32) },
		"first point late":         func(d *doc) { d.points[0].Out = 1 },
		"points descending in":     func(d *doc) { d.points[1].In = 9 },
		"points at one place":      func(d *doc) { d.points[1].In = 10 },
		"negative out":             func(d *doc) { d.points[1].Out = -1 },
		"negative in":              func(d *doc) { d.points[0].In = -1 },
		"point past the blob":      func(d *doc) { d.points[1].In = 1000 },
		"point past the tar":       func(d *doc) { d.points[1].Out = 4097 },
		"eight bits":               func(d *doc) { d.points[1].Bits = 8 },
		"bits before the blob":     func(d *doc) { d.points[0].In, d.points[0].Bits = 0, 1 },
		"huge span":                func(d *doc) { *d = plainDoc(index.MaxDataSize, index.MaxBlobFrame+1, 8) },
		"plain tar of other size":  func(d *doc) { *d = plainDoc(4096, 2048, 2); d.tarinfo++ },
		"plain tar, no span size":  func(d *doc) { *d = plainDoc(4096, 0, 2) },
		"plain tar, negative span": func(d *doc) { *d = plainDoc(4096, -1, 2) },
		"plain tar, spans":         func(d *doc) { *d = plainDoc(4096, 1024, 2) },
		"plain tar past its blob":  func(d *doc) { *d = plainDoc(4096, 2048, 2); d.tar++ },
		"plain tar of nothing":     func(d *doc) { *d = plainDoc(0, 2048, 1) },

		"no name":              func(d *doc) { d.files[0].name = "" },
		"climbs":               func(d *doc) { d.files[0].name = "a/../../b" },
		"long name":            func(d *doc) { d.files[0].name = strings.Repeat("a", 256) },
		"hard link climbs":     func(d *doc) { d.files[1].kind, d.files[1].link = "hardlink", "../x" },
		"hard link to nothing": func(d *doc) { d.files[1].kind = "hardlink" },
		"symlink to nothing":   func(d *doc) { d.files[2].link = "" },
		"long symlink":         func(d *doc) { d.files[2].link = strings.Repeat("a", index.MaxLink+1) },
		"type":                 func(d *doc) { d.files[0].kind = "socket" },
		"no type":              func(d *doc) { d.files[0].kind = "" },
		"device":               func(d *doc) { d.files[1].kind, d.files[1].major = "char", 4096 },
		"negative device":      func(d *doc) { d.files[1].kind, d.files[1].minor = "block", -1 },
		"time":                 func(d *doc) { d.files[0].time = "yesterday" },
		"long time":            func(d *doc) { d.files[0].time = "2020-01-01T00:00:00." + strings.Repeat("0", 100) + "Z" },
		"no room for header":   func(d *doc) { d.files[0].off = 511 },
		"no room between":      func(d *doc) { d.files[1].off = 512 + 1024 + 511 },
		"overlap":              func(d *doc) { d.files[0].size = 1600 },
		"same twice":           func(d *doc) { d.files = append(d.files, d.files[2]) },
		"out of order":         func(d *doc) { d.files[0], d.files[1] = d.files[1], d.files[0] },
		"negative offset":      func(d *doc) { d.files[0].off = -512 },
		"least offset":         func(d *doc) { d.files[0].off = math.MinInt64 },
		"negative size":        func(d *doc) { d.files[0].size = -1 },
		"past the tar":         func(d *doc) { d.files = d.files[:1]; d.files[0].size = 4096 },
		"size overflows":       func(d *doc) { d.files[0].size = math.MaxInt64 },
		"directory past tar":   func(d *doc) { d.files[2].off = 4097 },
		"sparse":               func(d *doc) { d.files[0].pax = []string{sparse + "major", "1"} },
		"libarchive value":     func(d *doc) { d.files[0].pax = []string{"LIBARCHIVE.xattr.user.x", "!"} },
		"libarchive name":      func(d *doc) { d.files[0].pax = []string{"LIBARCHIVE.xattr.user.%zz", "AAAA"} },
		"long attribute name":  func(d *doc) { d.files[0].pax = []string{"SCHILY.xattr." + strings.Repeat("x", 256), "1"} },
		"long attribute":       func(d *doc) { d.files[0].pax = []string{"SCHILY.xattr.user.x", strings.Repeat("x", 1<<16)} },
		"nameless attribute":   func(d *doc) { d.files[0].pax = []string{"SCHILY.xattr.", "1"} },
		"many long attributes": func(d *doc) { d.files[0].pax = manyXattrs(20, 60_000) },
		"shared PAX records":   func(d *doc) { d.sharedPAX, d.files = 1<<16, manyFiles(d, 1000) },
		"shared span digests":  func(d *doc) { d.sharedDigests = 1<<16 - 2; d.last, d.have = 1<<16-1, 1<<16 },
		"shared names":         func(d *doc) { d.files, d.sharedName = manyFiles(d, 9000), strings.Repeat("./", 15_000)+"x" },
		"shared plain digests": func(d *doc) { *d = plainDoc(1<<20, 1, 2); d.sharedDigests, d.last = 1<<20-2, 1<<20-1 },
		"more points than will": func(d *doc) {
			*d = plainDoc(index.MaxPoints+1, 1, 2)
			d.sharedDigests, d.last = index.MaxPoints-1, index.MaxPoints
		},
	} {
		d := sound()
		change(&d)
		blob := d.blob
		if name == "blob size" {
			blob--
		}
		raw := d.bytes()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := Read(raw, blob)
		runtime.ReadMemStats(&after)
		if !errors.Is(err, index.ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
		// Cleaning a name makes garbage of its size.
		if n := after.TotalAlloc - before.TotalAlloc; n > 8<<20+20*uint64(len(raw)) && name != "shared names" {
			t.Errorf("%s: %d bytes allocated for a zTOC of %d", name, n, len(raw))
		}
	}
}

func manyXattrs(n, size int) (pax []string) {
	for i := range n {
		pax = append(pax, fmt.Sprintf("SCHILY.xattr.user.%d", i), strings.Repeat("x", size))
	}
	return pax
}

func manyFiles(d *doc, n int) (files []docFile) {
	d.tar = int64(n+2) * 512
	for i := range n {
		files = append(files, docFile{name: "a", kind: "dir", off: int64(i+1) * 512})
	}
	return files
}

// TestTruncated reads every beginning of a zTOC, and it with every byte changed.
func TestTruncated(t *testing.T) {
	d := sound()
	d.points = d.points[1:]
	d.files[0].pax = []string{"SCHILY.xattr.user.x", "1"}
	raw := d.bytes()
	try := func(b []byte) {
		l, err := Read(b, d.blob)
		switch {
		case err == nil:
			if err := covers(l); err != nil {
				t.Fatal(err)
			}
		case !errors.Is(err, index.ErrMalformed):
			t.Fatal(err)
		}
	}
	window := len(raw) - windowSize // what is of interest is not the zeroes
	for n := range raw {
		if n%97 == 0 || n < 2048 || n > len(raw)-64 {
			try(raw[:n:n])
		}
		if window > 0 && raw[n] == 0 && n%61 != 0 {
			continue
		}
		for _, x := range []byte{0xff, 0x80, 1, 4} {
			b := append([]byte(nil), raw...)
			b[n] ^= x
			try(b)
		}
	}
}
