package jtoc

import (
	"encoding/json"
	"maps"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// standard reads an entry by encoding/json alone.
func standard(doc []byte) (e entry, err error) {
	type slow entry
	err = json.Unmarshal(doc, (*slow)(&e))
	return e, err
}

var entryDocs = []string{
	`{"type":"reg","name":"./a","size":384,"modtime":"2025-07-14T21:23:54Z","mode":420,"offset":83839,"digest":"sha256:d0","chunkDigest":"sha256:d0"}`,
	"{\n\t\"type\": \"dir\" ,\r\n \"name\" : \"./\", \"mode\":493 }",
	`{"type":"chunk","name":"a","offset":1,"innerOffset":2,"endOffset":3,"chunkOffset":4,"chunkSize":5,"chunkDigest":"sha256:d1","chunkType":"zeros"}`,
	`{"type":"symlink","name":"s","linkName":"a\u00e9\n","uid":4294967295,"gid":0}`,
	`{"type":"reg","name":"caf` + "\xc3\xa9" + `","size":-1}`, `{"name":"` + "\xff" + `"}`, `{"name":"\ud800"}`,
	`{"size":999999999999999999}`, `{"size":1000000000000000000}`, `{"size":99999999999999999999}`, `{"size":1.0}`, `{"size":1e3}`, `{"size":"1"}`, `{"size":-0}`,
	`{"Name":"A","TYPE":"reg"}`, `{"name":"a","name":"b"}`, `{"name":"a","name":null}`, `{"size":5,"SIZE":6}`, `{"name":"a","Name":"b","more":{}}`,
	`{"xattrs":{"user.a":"AP8="},"type":"reg"}`, `{"type":"char","devMajor":5,"devMinor":300}`, `{"type":"none"}`,
	`{}`, `null`, `[]`, `"x"`, `1`, `true`, `{"type":1}`, `{"mode":null}`, `{"userName":"root","type":"fifo"}`,
}

// What is read past encoding/json is what it would have read.
func TestPlain(t *testing.T) {
	for _, doc := range entryDocs {
		same(t, []byte(doc))
	}
}

func same(t *testing.T, doc []byte) {
	t.Helper()
	want, wantErr := standard(doc)
	var got entry
	err := json.Unmarshal(doc, &got)
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("%q: error %v, want %v", doc, err, wantErr)
	}
	if err != nil {
		return
	}
	if got.lastTime = ""; !maps.EqualFunc(got.Xattrs, want.Xattrs, func(a, b []byte) bool { return string(a) == string(b) }) {
		t.Fatalf("%q: extended attributes %v, want %v", doc, got.Xattrs, want.Xattrs)
	}
	got.Xattrs, want.Xattrs = nil, nil
	if d := cmp.Diff(want, got, cmp.AllowUnexported(entry{})); d != "" {
		t.Fatalf("%q: %s", doc, d)
	}
}

func FuzzPlain(f *testing.F) {
	for _, doc := range entryDocs {
		f.Add([]byte(doc))
	}
	f.Fuzz(same)
}
