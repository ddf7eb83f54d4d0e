package main

import (
	"encoding/xml"
	"net/http"
)

// The bodies of S3's answers, as far as the clients look at them.

type failure struct {
	XMLName xml.Name `xml:"Error"`
	Code    string
	Message string
}

type location struct {
	XMLName xml.Name `xml:"LocationConstraint"`
}

type initiated struct {
	XMLName  xml.Name `xml:"InitiateMultipartUploadResult"`
	Bucket   string
	Key      string
	UploadID string `xml:"UploadId"`
}

type checksums struct {
	ChecksumCRC32     string `xml:",omitempty"`
	ChecksumCRC32C    string `xml:",omitempty"`
	ChecksumCRC64NVME string `xml:",omitempty"`
	ChecksumSHA256    string `xml:",omitempty"`
	ChecksumType      string `xml:",omitempty"`
}

func checksumsOf(headers http.Header) checksums {
	return checksums{
		ChecksumCRC32:     headers.Get("x-amz-checksum-crc32"),
		ChecksumCRC32C:    headers.Get("x-amz-checksum-crc32c"),
		ChecksumCRC64NVME: headers.Get("x-amz-checksum-crc64nvme"),
		ChecksumSHA256:    headers.Get("x-amz-checksum-sha256"),
		ChecksumType:      headers.Get("x-amz-checksum-type"),
	}
}

type completed struct {
	XMLName xml.Name `xml:"CompleteMultipartUploadResult"`
	Bucket  string
	Key     string
	ETag    string
	checksums
}

type uploads struct {
	XMLName     xml.Name `xml:"ListMultipartUploadsResult"`
	Bucket      string
	IsTruncated bool
}

type listedPart struct {
	PartNumber int
	ETag       string
	Size       int64
	checksums
}

type partListing struct {
	XMLName     xml.Name `xml:"ListPartsResult"`
	Bucket      string
	Key         string
	UploadID    string `xml:"UploadId"`
	MaxParts    int
	IsTruncated bool
	Parts       []listedPart `xml:"Part"`
}

type contents struct {
	Key          string
	LastModified string
	ETag         string
	Size         int64
	StorageClass string
}

type commonPrefix struct {
	Prefix string
}

type listing struct {
	XMLName               xml.Name `xml:"ListBucketResult"`
	Name                  string
	Prefix                string
	Delimiter             string `xml:",omitempty"`
	EncodingType          string `xml:",omitempty"`
	MaxKeys               int
	KeyCount              int
	IsTruncated           bool
	NextContinuationToken string `xml:",omitempty"`
	Contents              []contents
	CommonPrefixes        []commonPrefix
}
