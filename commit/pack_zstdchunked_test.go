package commit

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"
)

// section reads what an annotation says lies in a skippable frame.
func section(t *testing.T, blob []byte, position string) (compressed, plain []byte) {
	t.Helper()
	var off, n, size int
	if _, err := fmt.Sscanf(position, "%d:%d:%d", &off, &n, &size); err != nil {
		t.Fatal(err)
	}
	if want := appendSkippable(nil, blob[off:off+n])[:skippableHeader]; !bytes.Equal(blob[off-skippableHeader:off], want) {
		t.Errorf("no frame of %d bytes begins before %d", n, off)
	}
	d, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	plain, err = d.DecodeAll(blob[off:off+n], nil)
	if err != nil || len(plain) != size {
		t.Fatalf("section of %d bytes, want %d: %v", len(plain), size, err)
	}
	return blob[off : off+n], plain
}

// TestChunkedContents puts every file together of its chunks alone, and the tar
// of the files and the tar-split.
func TestChunkedContents(t *testing.T) {
	list := sample()
	var b bytes.Buffer
	packed := packAll(t, &b, list, PackOptions{Compression: ZstdChunked})
	blob, notes := b.Bytes(), packed.Annotations
	if len(notes) != 3 {
		t.Errorf("annotations %v", notes)
	}
	compressed, doc := section(t, blob, notes[chunkedPosition])
	if digest.FromBytes(compressed).String() != notes[chunkedChecksum] {
		t.Error("the table's checksum is wrong")
	}
	var toc struct {
		Version        int
		Entries        []chunkedEntry
		TarSplitDigest string
	}
	if err := json.Unmarshal(doc, &toc); err != nil || toc.Version != 1 {
		t.Fatal(toc.Version, err)
	}

	d, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	files := storage.NewBufferFileGetPutter()
	entries := toc.Entries
	for i := range list {
		h, body := &list[i].h, list[i].body
		if len(entries) == 0 || entries[0].Name != h.Name {
			t.Fatalf("no entry for %s", h.Name)
		}
		e := entries[0]
		n := 1
		for n < len(entries) && entries[n].Type == "chunk" {
			n++
		}
		var content bytes.Buffer
		for k, c := range entries[:n] {
			if e.Size == 0 {
				continue
			}
			end, size, sum := e.EndOffset, e.Size, e.Digest
			if n > 1 {
				size, sum = c.ChunkSize, c.ChunkDigest
			}
			if k+1 < n {
				end = entries[k+1].Offset
			}
			p, err := d.DecodeAll(blob[c.Offset:end], nil)
			if err != nil || int64(len(p)) != size || hexDigest(sha256.Sum256(p)) != sum || c.ChunkOffset != int64(content.Len()) {
				t.Fatalf("%s: chunk %d of %d at %d: %v, %d bytes, want %d", h.Name, k, n, c.ChunkOffset, err, len(p), size)
			}
			zero := len(bytes.Trim(p, "\x00")) == 0
			if hole := c.ChunkType == "zeros"; n > 1 && (hole && !zero || !hole && zero && len(p) >= minHole) {
				t.Errorf("%s: chunk of %d bytes at %d: type %q", h.Name, size, c.ChunkOffset, c.ChunkType)
			}
			content.Write(p)
		}
		if !bytes.Equal(content.Bytes(), body) || len(body) > 0 && e.Digest != digest.FromBytes(body).String() {
			t.Errorf("%s: %d bytes, want %d", h.Name, content.Len(), len(body))
		}
		if _, _, err := files.Put(h.Name, &content); err != nil {
			t.Fatal(err)
		}
		entries = entries[n:]
	}
	if len(entries) > 0 {
		t.Errorf("entries left: %v", entries)
	}

	compressed, split := section(t, blob, notes[chunkedTarSplit])
	if digest.FromBytes(compressed).String() != toc.TarSplitDigest {
		t.Error("the tar-split's digest is wrong")
	}
	tarred, err := io.ReadAll(asm.NewOutputTarStream(files, storage.NewJSONUnpacker(bytes.NewReader(split))))
	if err != nil || digest.FromBytes(tarred) != packed.DiffID {
		t.Errorf("the tar-split makes a tar of %d bytes: %v", len(tarred), err)
	}
	if !strings.HasSuffix(string(blob), chunkedMagic) {
		t.Error("no footer")
	}
}

// TestRoller cuts one content as it comes in pieces of any size, and with bytes
// before it: cuts are the same then, but for the first.
func TestRoller(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	content := noise(r, 4*mib)
	clear(content[mib : mib+5000])
	cuts := func(p []byte) (at []int) {
		roll := newRoller()
		done, from := 0, 0
		for len(p) > 0 {
			n, step := roll.next(p[:min(len(p), 1+r.IntN(10000))], done-from)
			p = p[n:]
			done += n
			switch step {
			case rollHole:
				roll.hole = true
				from = done - minHole
				at = append(at, from)
			case rollCut:
				from = done
				at = append(at, from)
			}
		}
		return at
	}
	want := cuts(content)
	if len(want) < 30 || len(want) > 130 {
		t.Errorf("%d chunks of 4 MiB", len(want))
	}
	if got := cuts(content); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("cuts depend on how the content comes:\n%v\n%v", want, got)
	}
	moved := map[int]bool{}
	for _, at := range cuts(append(noise(r, 777), content...)) {
		moved[at-777] = true
	}
	lost := 0
	for _, at := range want {
		if !moved[at] {
			lost++
		}
	}
	if lost > 2 {
		t.Errorf("%d of %d cuts moved with the content", lost, len(want))
	}
}
