// Package indextest makes the tars that the tests of the layer readers share.
package indextest

import (
	"archive/tar"
	"bytes"
	"testing"
)

// Member is an entry of a test's tar. A header without a type is a regular
// file; its size is that of Data.
type Member struct {
	H    tar.Header
	Data []byte
}

// Tar writes members in the given format.
func Tar(t testing.TB, format tar.Format, ms []Member) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, m := range ms {
		h := m.H
		h.Size, h.Format = int64(len(m.Data)), format
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(m.Data); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// Noise gives n bytes that do not compress, the same for the same seed.
func Noise(n int, seed uint64) []byte {
	p := make([]byte, n)
	for i := range p {
		seed = seed*6364136223846793005 + 1442695040888963407
		p[i] = byte(seed >> 56)
	}
	return p
}
