package inflate

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"testing"

	"github.com/varvefs/varve/index/indextest"
)

// mixed gives n bytes of text, noise, and repetitions near and far.
func mixed(n int) []byte {
	b := make([]byte, 0, n+4096)
	noise := indextest.Noise(64<<10, 3)
	for i := 0; len(b) < n; i++ {
		at := int(noise[i%len(noise)])<<8 | int(noise[(i*7+1)%len(noise)])
		switch i % 8 {
		case 0:
			k := at % 200
			b = append(b, noise[at%(len(noise)-k):][:k]...)
		case 1:
			b = append(b, bytes.Repeat(noise[at%1000:][:1+at%11], 1+at%40)...)
		case 2:
			if back := 1 + at%len(noise)/2; back <= len(b) {
				from := len(b) - back
				b = append(b, b[from:min(from+at%300, len(b))]...)
			}
		default:
			b = fmt.Appendf(b, "/usr/share/%x/lib%d.so.%d root:x:%d\n", at&0xfff, i, at%9, at)
		}
	}
	return b[:n]
}

// compress makes one gzip member.
func compress(t testing.TB, p []byte, level int) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := gzip.NewWriterLevel(&buf, level)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(p); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}
