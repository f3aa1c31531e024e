package fetch

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"strings"
	"testing"
)

// sparseFiles are files with holes, as GNU tar writes them, between others. Points
// lie in those.
func sparseFiles() []file {
	return []file{
		{"plain1", noise(600_000, 1)}, {"sparse1", append(make([]byte, 8192), noise(4096, 2)...)},
		{"plain2", noise(6000, 3)}, {"sparse2", append(make([]byte, 4096), noise(512, 4)...)},
		{"plain3", noise(100, 5)},
	}
}

// sparseLayer is a plain tar of sparseFiles.
func sparseLayer(t testing.TB) *layer {
	t.Helper()
	fs := sparseFiles()
	blob := sparseTar(fs)
	d := fmt.Sprintf("sha256:%x", sha256.Sum256(blob))
	return &layer{
		Request: Request{Digest: d, Size: int64(len(blob)), MediaType: "application/vnd.oci.image.layer.v1.tar"},
		diffID:  d, blob: blob, files: fs,
	}
}

func sparseTar(fs []file) []byte {
	var buf bytes.Buffer
	for _, f := range fs {
		data := f.data
		h := make([]byte, 512)
		put := func(at int, format string, args ...any) { copy(h[at:], fmt.Sprintf(format, args...)) }
		put(0, "%s", f.name)
		put(100, "%07o", 0o644)
		put(108, "%07o", 0)
		put(116, "%07o", 0)
		put(136, "%011o", 0)
		put(257, "ustar  \x00")
		h[156] = '0'
		if strings.HasPrefix(f.name, "sparse") {
			holes := len(data) - len(bytes.TrimLeft(data, "\x00"))
			holes = holes / 512 * 512
			data = data[holes:]
			h[156] = 'S'
			put(386, "%011o", holes)
			put(398, "%011o", len(data))
			put(483, "%011o", len(f.data))
		}
		put(124, "%011o", len(data))
		put(148, "        ")
		sum := 0
		for _, b := range h {
			sum += int(b)
		}
		put(148, "%06o\x00 ", sum)
		buf.Write(h)
		buf.Write(data)
		buf.Write(make([]byte, -len(data)&511))
	}
	buf.Write(make([]byte, 1024))
	return buf.Bytes()
}
