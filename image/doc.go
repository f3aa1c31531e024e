// Package image knows what an image is before any of its files are: what its
// name means, which registry, mirror or archive holds it, which manifest is the
// one for a platform, what its config says, and where the bytes of its layers
// lie. It keeps what it has read in a local OCI layout, so that a mount can be
// made again with the registry away.
//
// A [Name] is parsed once and then opened with [Registries.Source]. A [Source]
// speaks to a registry, or reads an OCI layout or an archive of docker save. It
// gives a [Manifest], the bytes of its config, and for each layer a [Blob]: a
// description of where the bytes are, not a stream of them. Fetching them is
// the work of others.
//
// Nothing of a credential is kept, logged or put into an error: [Auth] holds
// paths, which are read again whenever a token has to be asked for.
package image
