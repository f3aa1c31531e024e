package index

import (
	"encoding/base64"
	"fmt"
	"net/url"
	"strings"
)

// The keys of PAX records that are extended attributes. libarchive's name is
// escaped as in a URL, its value is base64.
const (
	paxSchily     = "SCHILY.xattr."
	paxLibarchive = "LIBARCHIVE.xattr."
)

// PAXXattrs gives the extended attributes among a header's PAX records, in both
// forms that there are. bsdtar writes both; the one that needs no decoding is
// believed. It keeps no memory of the records.
func PAXXattrs(records map[string]string) ([]Xattr, error) {
	var all map[string]string
	set := func(name, value string) {
		if all == nil {
			all = map[string]string{}
		}
		all[name] = value
	}
	for k, v := range records {
		if name, ok := strings.CutPrefix(k, paxSchily); ok {
			set(strings.Clone(name), v)
		}
	}
	for k, v := range records {
		name, ok := strings.CutPrefix(k, paxLibarchive)
		if !ok {
			continue
		}
		name, err := url.PathUnescape(name)
		if err != nil {
			return nil, fmt.Errorf("%w: PAX record %.80q: %w", ErrMalformed, k, err)
		}
		if _, ok := all[name]; ok {
			continue
		}
		// libarchive leaves out the padding.
		value, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(v, "="))
		if err != nil {
			return nil, fmt.Errorf("%w: PAX record %.80q: %w", ErrMalformed, k, err)
		}
		set(strings.Clone(name), string(value))
	}
	return SortXattrs(all)
}

// IsPAXXattr reports whether a PAX record is an extended attribute.
func IsPAXXattr(key string) bool {
	return strings.HasPrefix(key, paxSchily) || strings.HasPrefix(key, paxLibarchive)
}
