// Package zstdblocks decompresses zstd blobs and makes points at which their
// decompression can begin again: at frames, and at blocks within frames, which is
// where it is needed, since most writers of layers make one frame of a blob.
//
// # Design
//
// What a decoder knows where a block begins are the Huffman tree and the three
// tables of sequences that later blocks may repeat, three repeat offsets, and the
// window. All of it can be said in zstd: a point's State is the beginning of a
// frame which brings any decoder there. Synthetic blocks set the tables, each in
// the words and mode of the block that set it in the blob, and the repeat
// offsets; raw blocks hold the window (see makeState). State and blob, one after
// the other, are decompressed as one stream whose beginning is dropped. A
// dictionary was the other way to say it. It needs distributions for tables that
// are predefined or of one code, a tree where there is none yet, and repeat offsets
// that lie in its content, and decoders differ in how an offset may reach from the
// window into it; the beginning of a frame has none of these.
//
// The decompressor (klauspost's) tells nobody of offsets, so a tracer beside it
// decodes the sequences again, in its own goroutine, without executing them. It
// finds out tables and repeat offsets where a point is, and which bytes before it
// are referred to behind it: up to a window behind, not to the next point alone,
// so that a resumed reader may read to the blob's end (with a window of 8 MiB and
// points every 4 MiB that takes a tenth more). The other bytes of the window are
// zeroes in the State, and what lies before the first that is referred to is left
// out. From a window behind a point to the next, the tracer skims.
//
// Windows are limited to 128 MiB, and points are made in frames of at most 32 MiB
// of window: twice that is kept of the content, so that a State can be made when
// it is known what it needs. The first 9 MiB of a frame are held back from the
// tracer until a point is wanted or they are full: a blob of many small frames
// costs nothing.
//
// # Measured
//
// 100 MiB of the tar of a Debian layer as one frame, points every 4, 8 and 16 MiB.
// CPU is against the same decompressor alone, in one goroutine; in its own four it
// takes 1.2 to 1.5 of that. Size is that of all States, compressed by zstd, in
// percent of the content; a second layer's were half to all of it.
//
//	written by         window   CPU               size in %
//	klauspost default   8 MiB   2.5  2.1  1.8     1.7  0.73  0.34
//	klauspost fastest   4 MiB   2.2  1.9  1.8     0.5  0.28  0.13
//	zstd -3             2 MiB   1.9  1.6  1.5     0.75 0.31  0.11
//	zstd -19            8 MiB   2.9  2.4  2.0     6.0  2.8   1.2   (32 MiB: 0.44)
//
// Without points it is 1.0. In time: the decompressor takes 1.0 to 1.5 ms for a
// MiB, points add 0.5 to 3. A point is resumed from, to the first byte, in 1 to 8
// ms on average.
//
// Whole windows need no marks, but at 0.6 MB for 2 MiB and 2.4 MB for 8 MiB,
// compressed, they come to the sizes for 16 MiB above only with points every 200
// to 700 MiB. A recompressed copy needs no tracing, but is 32 to 35 % of the
// content and takes 3 to 4.5 times the CPU of the decompression.
//
// Recommended: a point wherever a frame begins and 8 MiB have passed; within
// frames every 8 MiB as long as the points so far take no more than 0.7 % of the
// content (index.PointsWriter.Bytes says), which comes to 8 MiB for small windows,
// 8 to 16 for klauspost's and some 24 for zstd -19.
package zstdblocks
