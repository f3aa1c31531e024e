package fetch

import (
	"strings"
	"testing"

	"github.com/varvefs/varve/index/estargz"
)

// Whoever serves other bytes under an honest layer's digest, and a table of
// contents that fits them, must not reach the images that vouch for another
// table or for none.
func TestLayersAreKeptApartByWhatVouchesForThem(t *testing.T) {
	digest := "sha256:" + strings.Repeat("a", 64)
	toc := func(c string) map[string]string {
		return map[string]string{estargz.AnnotationTOCDigest: "sha256:" + strings.Repeat(c, 64)}
	}
	seen := map[string]int{}
	for i, q := range []Request{
		{Digest: digest, Size: 9},
		{Digest: digest, Size: 9, Annotations: toc("b")},
		{Digest: digest, Size: 9, Annotations: toc("c")},
		{Digest: digest, Size: 8, Annotations: toc("c")},
		{Digest: digest, Size: 9, Annotations: map[string]string{estargz.AnnotationTOCDigest: "../../../etc/passwd"}},
	} {
		key, err := q.key()
		if err != nil {
			t.Fatal(err)
		}
		if other, ok := seen[key]; ok {
			t.Errorf("requests %d and %d are kept as one, %s", other, i, key)
		}
		seen[key] = i
		if strings.ContainsAny(key, "/.") {
			t.Errorf("%q is no name of a directory", key)
		}
	}
	a, _ := (&Request{Digest: digest, Size: 9, Annotations: toc("b")}).key()
	b, _ := (&Request{Digest: digest, Size: 9, Annotations: toc("b"), MediaType: "other"}).key()
	if a != b {
		t.Errorf("one layer has two keys, %s and %s", a, b)
	}
	if _, err := (&Request{Digest: "sha512:" + strings.Repeat("a", 128)}).key(); err == nil {
		t.Error("a digest that nothing here computes is taken")
	}
}
